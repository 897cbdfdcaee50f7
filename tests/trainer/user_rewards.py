"""Rewards as users write them, good and bad: each does one thing to the process that calls it."""

import os
import signal
import subprocess
import sys
import threading


def length(text: str, answer: str) -> float:
    return float(len(text) - len(answer))


def odd(text: str, answer: str) -> float:
    """What it does is in the text."""
    match text:
        case "raise":
            raise KeyError("no\nsuch thing")
        case "exit":
            sys.exit(3)
        case "hang":
            threading.Event().wait()
        case "hang with a child":
            subprocess.run(["sleep", "1000"], check=False)
        case "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "nan":
            return float("nan")
        case "none":
            return None  # type: ignore[return-value]
        case "print":
            print("to standard output")
            return 1.0
    return float(answer == "good")
