"""Where Alembic starts. `run.py` hands over an open connection; `--sql` prints for the dialect it names."""

from __future__ import annotations

from alembic import context

from gateway.tables import metadata

connection = context.config.attributes.get("connection")
if connection is not None:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
else:
    context.configure(
        dialect_name=context.config.get_main_option("dialect"), target_metadata=metadata, literal_binds=True
    )
with context.begin_transaction():
    context.run_migrations()
