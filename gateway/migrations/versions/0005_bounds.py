"""Verdicts are unique in their project and keep no second copy of their job's report; what retention removes is found by index."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# The rows that the server itself writes for each attempt of an evaluation; of the audit log only they may ever go.
_OF_AN_ATTEMPT = (
    "OLD.actor = 'controller' AND OLD.action IN ('key.create', 'key.revoke') AND OLD.subject LIKE 'evaljob-%'"
)


def upgrade() -> None:
    with op.batch_alter_table("verdicts") as verdicts:
        verdicts.drop_constraint("uq_verdicts_digest_suite", type_="unique")
        verdicts.create_unique_constraint(
            "uq_verdicts_project_digest", ["project_id", "digest", "suite_digest", "fingerprint", "baseline"]
        )
        verdicts.drop_column("report")
    op.create_index(op.f("ix_job_events_at"), "job_events", ["at"])
    op.create_index(op.f("ix_job_attempts_finished_at"), "job_attempts", ["finished_at"])
    op.create_index("ix_audit_actor_action_at", "audit", ["actor", "action", "at"])
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER audit_no_delete")
        op.execute(
            f"CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit WHEN NOT ({_OF_AN_ATTEMPT}) "
            "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        )
    else:
        op.execute("DROP TRIGGER audit_no_change ON audit")
        op.execute(
            "CREATE TRIGGER audit_no_change BEFORE UPDATE OR TRUNCATE ON audit "
            "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()"
        )
        op.execute(
            "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit FOR EACH ROW "
            f"WHEN (NOT ({_OF_AN_ATTEMPT})) EXECUTE FUNCTION audit_append_only()"
        )
