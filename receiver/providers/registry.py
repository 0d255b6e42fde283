"""The providers that there are. A second one gets a folder beside `kling/` and is made here."""

from __future__ import annotations

from receiver.base.config import Settings
from receiver.providers.kling.client import Kling
from storage.circuit import Circuit


def make_kling(settings: Settings, circuit: Circuit) -> Kling:
    """Kling with the settings' keys. `circuit`: of its creates."""
    return Kling(
        base_url=settings.kling_base_url,
        api_key=settings.kling_api_key,
        access_key=settings.kling_access_key,
        secret_key=settings.kling_secret_key,
        webhook_secrets=settings.kling_webhook_secrets,
        circuit=circuit,
        proxy=settings.egress_proxy,
    )
