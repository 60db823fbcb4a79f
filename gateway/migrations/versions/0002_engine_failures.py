"""What a replica's failures were, for whoever waits and looks only now and then; and the engine's measured noise."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("replicas", sa.Column("failures", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("replicas", sa.Column("futile_starts", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("replicas", sa.Column("last_failure", sa.Text(), nullable=True))
    op.add_column("replicas", sa.Column("batch_noise", sa.Float(), nullable=True))
