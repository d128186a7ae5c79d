"""Make an API key for the server: prints the key, for its user, and its entry for the server's secret.

python jobs/make_api_key.py web --macs-per-second 2e12
"""

import argparse

from aptp_platform.serve.http.keys import make_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="who will use it; it stands in the decision log")
    parser.add_argument("--macs-per-second", type=float, help="multiply-adds that it may ask for; unset: no limit")
    args = parser.parse_args()
    try:
        token, entry = make_key(args.name, args.macs_per_second)
    except ValueError:
        parser.error("name: letters, digits and . _ @ - alone; --macs-per-second: above 0")
    print(f"key, shown this once: {token}")
    print(f"entry of the secret:  {entry.model_dump_json(exclude_none=True)}")


if __name__ == "__main__":
    main()
