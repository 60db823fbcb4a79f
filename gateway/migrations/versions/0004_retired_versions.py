"""When a version was retired, and when it last answered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapter_versions", sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("adapter_versions", sa.Column("used_at", sa.DateTime(timezone=True), nullable=True))
