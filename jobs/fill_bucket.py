"""Copy local folders into a bucket of an S3-compatible server, which is created if it is missing.

python jobs/fill_bucket.py --endpoint http://127.0.0.1:5001 aptp examples/emoji/shards=shards
"""

import argparse
import sys

from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import StorageConfig, Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", help="of the server; unset: the provider's own")
    parser.add_argument("bucket")
    parser.add_argument("folders", nargs="+", metavar="FOLDER=NAME", help="a local folder and what it becomes")
    args = parser.parse_args()
    try:
        bucket = Store.open(f"s3://{args.bucket}", StorageConfig(endpoint=args.endpoint))
        bucket.make()
        for each in args.folders:
            folder, _, name = each.partition("=")
            bucket.publish(folder, name)
            print(f"{folder} is {bucket.uri}/{name}")
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
