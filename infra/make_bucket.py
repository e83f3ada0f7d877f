"""Make the bucket named on the command line, unless it is there. Run by compose.yaml."""

from __future__ import annotations

import sys

import boto3
from botocore.exceptions import ClientError
from gristmill.schemas.settings import load_settings


def main(bucket: str) -> None:
    settings = load_settings()
    key, secret = settings.s3_access_key, settings.s3_secret_key
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=key.get_secret_value() if key else None,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
    )
    try:
        client.create_bucket(Bucket=bucket)
    except ClientError as exc:
        if exc.response["Error"]["Code"] not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
            raise
    print(f"bucket {bucket} is there", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
