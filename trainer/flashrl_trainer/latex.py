r"""LaTeX answers reduced to what can be compared: the content of `\boxed{}`, without spacing and wrappers.

Knows nothing of rewards, and no mathematics: `\frac{1}{2}` and `0.5` stay different.
"""

import re

_BOXED = "\\boxed{"
_FRACTIONS = re.compile(r"\\[dt]frac")
_WRAPPERS = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*+)\}")
_NOISE = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ()\[\]%$]|\^\{?\\circ\}?|[$%*\s]")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` whose braces are balanced, or None."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        # looking no further than where the last attempt began keeps a text of a million open boxes linear
        content = _to_closing_brace(text[start + len(_BOXED) : end])
        if content is not None:
            return content
        end = start
    return None


def without_latex(answer: str) -> str:
    r"""`"x = $\boxed{\dfrac{1}{2}}$."` -> `"\frac{1}{2}"`: right of the last equals sign, in one spelling."""
    content = (last_boxed(answer) or answer).split("=")[-1]
    content = _WRAPPERS.sub(r"\1", _FRACTIONS.sub(r"\\frac", content))
    return _NOISE.sub("", content).rstrip(".")


def _to_closing_brace(text: str) -> str | None:
    depth = 1
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[: match.start()]
    return None
