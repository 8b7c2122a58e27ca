"""What a pod of several ranks does before SIGTERM: wait until nothing runs any more, SECONDS at most.

usage: python drain.py SECONDS. Asks the first rank (LWS_LEADER_ADDRESS, else this machine) how busy it is, with
TOKENSPEED_API_KEY where the server has keys. The first ten seconds are waited for in any case, so that the gateway
stops sending requests; a server that is not ready any more has no streams left to wait for, so that a group that failed
is replaced after these.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request

NOTICE_SECONDS = 10.0
"""How long the gateway may take to learn that this pod ends."""


def busy(base: str, key: str) -> bool:
    """Whether the server at `base` serves and has requests, running or waiting."""
    try:
        with urllib.request.urlopen(f"{base}/ready", timeout=5):
            pass
        asked = urllib.request.Request(f"{base}/v1/load", headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            load = json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it serves, and does not say to whom: all of the time is waited
    except OSError:
        return False
    return bool(load["num_requests_running"] or load["num_requests_waiting"])


def main() -> None:
    """Return when nothing runs, or when the time is over."""
    end = time.monotonic() + float(sys.argv[1])
    base = f"http://{os.environ.get('LWS_LEADER_ADDRESS', '127.0.0.1')}:{os.environ.get('TOKENSPEED_PORT', '8000')}"
    key = os.environ.get("TOKENSPEED_API_KEY", "")
    notice = min(end, time.monotonic() + NOTICE_SECONDS)
    while busy(base, key) or time.monotonic() < notice:
        if time.monotonic() >= end:
            return
        time.sleep(0.5)


if __name__ == "__main__":
    main()
