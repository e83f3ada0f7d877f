"""The S3 client, as the settings say; for results and for models."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..schemas.settings import Settings

READ_TIMEOUT_S = 30.0
ATTEMPTS = 3
CONNECTIONS = 32


def s3_client(settings: Settings) -> Any:
    """boto3 is imported here: half a second that only users of S3 pay."""
    boto3: Any = import_module("boto3")
    config_class: Any = import_module("botocore.config").Config
    access, secret = settings.s3_access_key, settings.s3_secret_key
    session = boto3.session.Session(
        aws_access_key_id=access.get_secret_value() if access else None,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        region_name=settings.s3_region,
    )
    custom = settings.s3_endpoint_url
    config = config_class(
        connect_timeout=settings.connect_timeout_s,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        # Behind an own endpoint bucket.host seldom resolves.
        s3={"addressing_style": "path" if custom else "auto"},
    )
    region = session.region_name or ("us-east-1" if custom else None)
    return session.client("s3", endpoint_url=custom, region_name=region, config=config)
