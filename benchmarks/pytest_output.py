"""What pytest -v says, with or without xdist, as far as it came: it may have been killed."""

import re

_STATUS = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
_XDIST_RESULT = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({_STATUS}) (.+?) *$", re.MULTILINE)
_RESULT = re.compile(rf"^(\S+\.py::.+?) ({_STATUS})\b", re.MULTILINE)
_STARTED = re.compile(r"^(\S+\.py::.+?) *$", re.MULTILINE)
_COLLECTION_ERROR = re.compile(r"^_+ ERROR collecting (\S+) _+$", re.MULTILINE)


def count_tests(text: str) -> dict:
    """Numbers by outcome; what failed; files that could not be imported; what was under way."""
    results = {name: status for status, name in _XDIST_RESULT.findall(text)} or dict(_RESULT.findall(text))
    statuses = list(results.values())
    collection = list(dict.fromkeys(_COLLECTION_ERROR.findall(text)))
    return {
        "passed": statuses.count("PASSED") + statuses.count("XPASS"),
        "failed": statuses.count("FAILED"),
        "skipped": statuses.count("SKIPPED") + statuses.count("XFAIL"),
        "errors": statuses.count("ERROR") + len(collection),
        "failures": [name for name, status in results.items() if status in ("FAILED", "ERROR")],
        "not_collected": collection,
        "unfinished": [name for name in dict.fromkeys(_STARTED.findall(text))
                       if name not in results and not re.search(rf" ({_STATUS})\b", name)],
    }  # fmt: skip
