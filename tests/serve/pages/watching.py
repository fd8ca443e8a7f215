"""Pages as a person uses them, watched for what must not happen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.pages.stage import Stage

expect = pytest.importorskip("playwright.sync_api").expect

REFUSED = re.compile("Policy|Trusted")  # what the browser says of a policy that was broken
PATIENCE = 8000  # milliseconds until something that should be seen counts as missing
# Expectations look again ever more rarely, so the page itself says when the last of so many answers is whole.
WHOLE = """([count, patience]) => new Promise(resolve => {
    const until = performance.now() + patience;
    (function look() {
        const all = [...document.querySelectorAll("article[data-role=assistant]")];
        const whole = all.length === count && all.at(-1).getAttribute("aria-busy") === "false";
        if (whole || performance.now() > until) resolve(); else setTimeout(look, 10);
    })();
})"""
MARKDOWN = """\
# The puna

The **puna** is the *high plain*, see [the article](https://example.org/a_(b) "more") or https://example.org/c.
A second line with `code`, ~~struck~~ and ***both***.

Title
- one
  - inner
  - other

    with a paragraph
- two

3. three
4. four

> quoted
> > twice

| Animal | kg |
|:--|--:|
| Llama | 155 |
| a \\| b | `x` |

```python
def f():
    return "```"

~~~
```
---
Tail with snake_case_name, 2 * 3 * 4 and an **open end
"""


# Each would set `pwned`, load something or leave the page, were it taken for markup.
ATTACKS = [
    "<script>pwned = 1</script>",
    "<img src=x onerror='pwned = 1'>",
    "<svg onload='pwned = 1'><style>*{display:none}</style></svg>",
    "<iframe src='javascript:parent.pwned = 1'></iframe>",
    "[click](javascript:pwned=1) "
    "[click](JaVaScRiPt:pwned=1) [click](data:text/html,<script>pwned=1</script>)",
    "[click](&#106;avascript:pwned=1) [click](\tjavascript:pwned=1) [click](vbscript:pwned=1)",
    "![picture](https://outside.example/spy.png) ![picture](javascript:pwned=1)",
    '[a](https://outside.example/" onmouseover="pwned=1) [b](//outside.example) [c](/v1/models)',
    '```html" onclick="pwned=1\n<script>pwned = 1</script>\n```',
    "|<b onclick=pwned=1>a</b>|\n|---|\n|<script>pwned=1</script>|",
    "# <style>@import 'https://outside.example/x.css'</style>",
    "<https://outside.example/> <a href='javascript:pwned=1'>x</a>",
]


def watched(browser: Any, stage: Stage, path: str, **options: Any) -> Iterator[Any]:
    """A page in a browser of its own, so to speak: nothing is kept there yet."""
    context = browser.new_context(reduced_motion="reduce", **options)
    yield from watched_in(context, stage, path)
    context.close()


def watched_in(context: Any, stage: Stage, path: str) -> Iterator[Any]:
    """A page which at the end has thrown nothing, broken no policy and asked nobody else.

    It is the context's first, emptied: a new one for each test would take most of its time.
    """
    stage.reset()
    context.set_default_timeout(PATIENCE)
    page = context.pages[0] if context.pages else context.new_page()
    page.goto("about:blank")  # while nothing writes any more
    session = context.new_cdp_session(page)
    session.send("Storage.clearDataForOrigin", {"origin": stage.url, "storageTypes": "all"})
    session.detach()
    faults: list[str] = []
    asked: list[str] = []
    listeners = {
        "weberror": lambda thrown: faults.append(str(thrown.error)),
        "console": lambda said: faults.append(said.text) if REFUSED.search(said.text) else None,
        "request": lambda request: asked.append(request.url),
    }
    for name, listener in listeners.items():
        context.on(name, listener)
    page.goto(stage.url + path)
    yield page
    for name, listener in listeners.items():
        context.remove_listener(name, listener)
    for other in context.pages[1:]:
        other.close()
    page.evaluate("sessionStorage.clear()")  # it is the window's, and so not among what is cleared above
    assert faults == []
    assert [url for url in asked if not url.startswith((stage.url, "data:", "blob:"))] == []


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any) -> Any:
    return page.locator("article[data-role=assistant]")


def finished(page: Any, count: int = 1) -> Any:
    """The last of so many answers, when it is there and whole."""
    page.evaluate(WHOLE, [count, PATIENCE])
    expect(answers(page)).to_have_count(count)
    expect(answers(page).last).to_have_attribute("aria-busy", "false")
    return answers(page).last


def ask(page: Any, text: str, count: int = 1) -> Any:
    say(page, text)
    return finished(page, count)


def set_up(page: Any, **settings: Any) -> None:
    """As the settings dialog keeps them."""
    page.evaluate("text => localStorage.setItem('puna.settings', text)", json.dumps(settings))
    page.reload()


def imported(page: Any, conversations: Any) -> None:
    text = json.dumps(conversations).encode()
    file = {"name": "some.json", "mimeType": "application/json", "buffer": text}
    page.locator("#file").set_input_files(file)


def audited(page: Any) -> None:
    """No violation of any of axe's rules."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    if page.evaluate("typeof axe") == "undefined":
        page.evaluate(axe.axe_script)  # half a megabyte
    found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found] == []
