"""Measures items of one stage, one after the other, for `benchmarks.gpu.runner`.

It tells of each item when it begins and when it ends, a line of JSON each, on a file descriptor of
its own: libraries write to standard output, too.
"""

import json
import os
import sys
import time
import traceback
from typing import Any

from benchmarks.gpu.stage import Size, Unavailable, module_of


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    size = Size(**request["size"])
    items = {item.name: item for item in module_of(request["stage"]).items(size)}
    with os.fdopen(request["channel"], "w", buffering=1) as channel:

        def tell(**event: Any) -> None:
            channel.write(json.dumps(event) + "\n")

        for name in request["items"]:
            item, start = items[name], time.time()
            tell(begins=name)
            try:
                entry = {"result": item.measure(min(start + item.seconds, request["deadline"]))}
            except Unavailable as reason:
                entry = {"skipped": str(reason)}
            except Exception:  # Whatever it is, it is kept, and the next item begins.
                entry = {"error": traceback.format_exc()}
            tell(ends=name, entry=entry | {"seconds": round(time.time() - start, 2)})


if __name__ == "__main__":
    main()
