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
    """A page which at the end has thrown nothing, broken no policy and asked nobody else."""
    stage.reset()
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    everything = {"origin": stage.url, "storageTypes": "all"}
    context.new_cdp_session(page).send("Storage.clearDataForOrigin", everything)
    faults: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if REFUSED.search(said.text) else None)

    def note(request: Any) -> None:
        asked.append(request.url)

    context.on("request", note)
    page.goto(stage.url + path)
    yield page
    context.remove_listener("request", note)
    for each in context.pages:
        each.close()
    assert faults == []
    assert [url for url in asked if not url.startswith((stage.url, "data:", "blob:"))] == []


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any) -> Any:
    return page.locator("article[data-role=assistant]")


def finished(page: Any, count: int = 1) -> Any:
    """The last of so many answers, when it is there and whole."""
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
    found = axe.run(page).response["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found] == []
