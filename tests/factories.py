"""Small builders of domain objects; every field has a default. Append, never change what others use."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gateway.database import DEFAULT_PROJECT
from gateway.registry.models import AdapterVersion, VersionState

A_MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def a_version(**fields: Any) -> AdapterVersion:
    """`support@1`, verified; other fields by name."""
    adapter, number = fields.get("adapter", "support"), fields.get("version", 1)
    defaults: dict[str, Any] = {
        "id": f"ver-{adapter}-{number}", "adapter": adapter, "version": number, "base_model": "tiny", "base_digest": "b" * 64,
        "rank": 8, "digest": f"{number:064x}", "manifest_digest": "c" * 64, "size_bytes": 1000, "state": VersionState.VERIFIED,
        "created_at": A_MOMENT, "created_by": "key:test", "project_id": DEFAULT_PROJECT,
    }  # fmt: skip
    return AdapterVersion.model_validate({**defaults, **fields})
