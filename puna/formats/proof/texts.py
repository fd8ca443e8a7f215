"""What two models are compared on: a text of many kinds, strings that tokenizers fail on, conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT = """\
Once upon a time a llama lived on a high plain, where the air is thin and the grass is short. Every
morning she walked down to the lake to drink, and every morning a fox sat on the same stone and watched
her. "Why do you sit there?" she asked one day. "Because the stone is warm," said the fox, "and because
nobody else asks me anything." So they talked about the weather, about the people in the valley who
counted their sheep twice, and about the train that had once stopped by mistake and left behind a single
red glove. When winter came the lake froze at its edges. The fox did not come for three days. On the
fourth the llama found him behind the hill, curled up around the glove, asleep. She lay down beside him,
on the side of the wind, and stayed until the sun was back.

# Keeping a well

A well that is used every day needs little care; one that is left alone for a year needs a great deal.

1. Lift the cover and wait ten minutes before you lean over it.
2. Measure the water: note the *depth*, the **date** and the name of whoever held the rope.
3. If the level fell by more than 40 cm since last time, tell the neighbours (see section 3.2).

| month    | rain (mm) | depth (m) | remark            |
|----------|----------:|----------:|-------------------|
| January  |      12.5 |      3.80 | frost, 11 nights  |
| February |       0.0 |      3.65 |                   |
| March    |     104.7 |      4.92 | bridge closed     |
| April    |      61.3 |      5.10 | -                 |

```python
import math
from collections import defaultdict


def distances(graph, start):
    \"\"\"Shortest way from `start` to every node; edges are (target, length) pairs.\"\"\"
    best = defaultdict(lambda: math.inf, {start: 0.0})
    queue = [(0.0, start)]
    while queue:
        queue.sort(reverse=True)
        so_far, node = queue.pop()
        for target, length in graph.get(node, ()):
            if so_far + length < best[target]:   # shorter than anything known
                best[target] = so_far + length
                queue.append((best[target], target))
    return dict(best)


assert distances({"a": [("b", 1.5)], "b": [("c", 2)]}, "a") == {"a": 0.0, "b": 1.5, "c": 3.5}
```

```c
static uint32_t mix(const unsigned char *bytes, size_t n) {
\tuint32_t h = 0x9E3779B9u;
\tfor (size_t i = 0; i < n; ++i) {
\t\th ^= bytes[i];
\t\th *= 0x01000193;  /* wraps */
\t}
\treturn h >> 1;
}
```

SELECT name, COUNT(*) AS visits FROM guests WHERE left_at IS NULL GROUP BY name HAVING COUNT(*) > 2;
{"id": 4711, "tags": ["α", "β"], "ok": true, "ratio": -1.25e-7, "none": null}
$ tar -xzf backup-2019.tar.gz && ls -la | grep '^d' > /dev/null; echo $?

Der Zug nach Süden fährt um 7:42 Uhr von Gleis 3 ab; wer ihn verpasst, muss bis zum Abend warten. Im
Speisewagen gibt es Kaffee, Brötchen und eine Zeitung von gestern. Draußen ziehen Äcker, Öfen und
übergroße Krähen vorbei.

Le garçon a mis la clé sous le pot de fleurs, près de l'escalier. « Tu la trouveras », a-t-il écrit, « même
sans lumière ». Il neigeait déjà sur les toits, et personne n'avait balayé l'entrée depuis Noël.

El año pasado plantamos dos higueras y un limonero. ¿Quién iba a decir que darían fruto tan pronto? ¡Qué
sorpresa! Mañana haremos mermelada con azúcar moreno y un poco de canela.

Старый мост скрипел под ногами, но держался. На том берегу пахло дымом и яблоками, и кто-то негромко пел.
Ο φάρος ανάβει μόλις δύσει ο ήλιος· τα καΐκια γυρίζουν ένα ένα στο λιμάνι.
Köprünün altındaki ırmak ilkbaharda yükselir; İstanbul'a giden yol o zaman kapanır.

春天来了,河边的柳树先绿了。孩子们放风筝,老人坐在桥头下棋,谁也不着急回家。
駅前の小さな本屋は、雨の日だけ猫が店番をしている。客が来ると「にゃあ」と鳴いて奥へ知らせる。
할머니는 장독대 옆에 고추를 널어 두고, 해가 지기 전에 다시 거두어들였다.
ذهب الصياد إلى البحر قبل الفجر، وعاد عند الظهر بسلّة مليئة بالسمك.
הספרייה נסגרת בשעה שמונה, אבל האור בחלון נשאר דולק עד חצות.
नदी के किनारे एक पुराना पीपल है, जिसके नीचे डाकिया रोज़ आराम करता है।
ร้านก๋วยเตี๋ยวหน้าตลาดเปิดตั้งแต่ตีห้า และปิดเมื่อน้ำซุปหมด

Numbers: 0 1 2 3 10 42 100 365 1,024 65536 1000000 3.14159265 2.718e-3 -17 +49 50% 1/3 ½ x² 10⁻⁹ 0b1011
0xFF MMXXIV. Sums: 12 + 30 = 42; 7 × 8 = 56; 144 / 12 = 12; 2**10 = 1024; √2 ≈ 1.414; ∑ 1/n² = π²/6; ∀x ∃y
(x < y). Dates: 2021-03-14, 14.03.2021, 3/14/21, 09:05:59, week 11, the 3rd of May. Prices: $4.99, €12,50,
¥800, £1m. Symbols: 🙂 🚀 🌧️ 👍🏽 👩‍🔬 👨‍👩‍👧 🇵🇪 ❤️ ✓ ✗ → ⇒ ↔ ★ © ™ … – — ‘single’ “double” «angled» § ¶ † ° ‰

"I counted them," said the girl, "and there were nineteen." Her brother shook his head. "Twenty. You
forgot the one behind the door." They counted again, slowly, each with a finger in the air, and this time
there were eighteen. Nobody spoke for a while. Then the door moved a little, and something small and grey
came out, looked at both of them, and sat down in the middle of the carpet as though it had always been
there.

Dear Sir or Madam,

thank you for your letter of the 9th. We regret that the lamp you ordered (no. B-2207/k) cannot be sent before
the end of the month, since the glass arrived broken. Should you prefer another colour, green and amber are in
stock. Otherwise we shall refund the full amount, less postage, within fourteen days.

Yours faithfully,
    P. Quispe, Dispatch
    tel. +51 84 555 0134 - p.quispe@example.org - https://example.org/lamps?id=2207&lang=en#stock
"""

HARD = (
    "",
    " ",
    "  ",
    "a",
    " a",
    "  a",
    "a ",
    "a  b   c    d",
    " " * 17 + "x" + " " * 40,
    "\t",
    "\t\tx\t y\t",
    "\n",
    "\r\n",
    "\n\n\n a\n \n\tb\r\n\r\n",
    "line\u2028separator\u2029paragraph\x85next\x0bvertical\x0cform",
    "0",
    "7 42 365 1024 65536 1234567890",
    "3.14159 1e-10 0x1F 1,000,000 ٣٤٥ १२३ Ⅻ ½",
    "2021-03-14T15:09:26.535+01:00",
    "🙂",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇵🇪🇧🇴 ❤️‍🔥",
    "e\u0301 a\u0308\u0304 n\u0303 \u0301alone",
    "q\u0307\u0323 q\u0323\u0307",
    "Å Å ﬁ ﬃ ß ẞ İ ı ǆ",
    "日本語のテキスト、中文没有空格。한국어는 있다",
    "𠮷野家 𝒜𝓁𝓅𝒽𝒶 𐍈 \U0010fffd",
    "שלום עולם مرحبا بالعالم \u202eevird\u202c",
    "हिन्दी ไทย བོད་སྐད་ தமிழ்",
    "don't DON'T you'll THEY'RE it's we'd I'm could've 'tis",
    "def f(self, *args, **kw):\n    return {k: v for k, v in kw.items() if not k.startswith('__')}\n",
    "if(a<b&&c>=d||!e){x->y[i]+=*p++;}//end\n\t\t}",
    "<html><body class='x'>&nbsp;&lt;</body></html>",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt",
    "\0",
    "a\0b\x01\x02\x1b[0m\x7f",
    "\u00a0\u2003\u3000\u200b\u200d\ufeff\u00ad",
    "\ufffd \ufffe \uffff",
    "▁ ▁a a▁b ▁▁▁",
    "<s></s><unk><pad> <0x0A> <|endoftext|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "[INST] <<SYS>>\nx\n<</SYS>>\n\ny [/INST] z",
    "CamelCaseWord snake_case_word kebab-case-word SCREAMING_CASE mIxEd",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
    "a" * 300,
    "ab" * 150,
    "=" * 80,
    "!?!?...,,,;;;:::---___***###",
    "Ünïcödé ïs hàrd; naïve façade, Łódź, Đà Nẵng, Ħal Għaxaq",
    "The quick brown fox",
    " the the The THE",
)

_ASKED = {"role": "user", "content": "How warm is it in Cusco?"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place, now.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "A town."}},
            "required": ["place"],
        },
    },
}
_CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Cusco"}},
}
_CALLED = (
    _ASKED,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": '{"celsius": 17}'},
)
_LONG = tuple(
    {"role": role, "content": f"{words} {number}"}
    for number in range(12)
    for role, words in (("user", "What comes after"), ("assistant", "It is one more than"))
)


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given."""

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)


_MESSAGES: tuple[tuple[Mapping[str, Any], ...], ...] = (
    ({"role": "user", "content": "Hello"},),
    (
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "  Why is the sky blue?\n"},
    ),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And twice that?"},
    ),
    (
        {"role": "user", "content": "What do <s>, </s>, <|eot_id|> and <|im_end|> mean? [/INST] <</SYS>>"},
        {"role": "assistant", "content": "They are markers <|end_header_id|> such as </s>."},
        {"role": "user", "content": "日本語で 🙂\n\nplease"},
    ),
)

CONVERSATIONS = (
    *(Conversation(messages) for messages in _MESSAGES),
    *(Conversation(messages, add_generation_prompt=False) for messages in _MESSAGES),
    *(Conversation(messages[:-1], add_generation_prompt=False) for messages in (*_MESSAGES[2:], _LONG)),
    Conversation(_LONG[:5]),
    Conversation(_LONG[:7]),
    Conversation(_LONG[:-1]),
    Conversation(_LONG, add_generation_prompt=False),
    Conversation((_MESSAGES[1][0], *_LONG[:-1])),
    Conversation((_ASKED,), variables={"tools": [_TOOL]}),
    Conversation((_MESSAGES[1][0], _ASKED), variables={"tools": [_TOOL]}),
    Conversation((_ASKED,), variables={"tools": [_TOOL, _TOOL], "tools_in_user_message": False}),
    Conversation(_CALLED),
    Conversation(_CALLED, variables={"tools": [_TOOL]}),
    Conversation((*_CALLED, {"role": "assistant", "content": "17 °C."}), False, {"tools": [_TOOL]}),
    Conversation(({"role": "user", "content": "Hi"}, {"role": "tool", "content": "17"})),
    Conversation(({"role": "user", "content": "Hi"}, {"role": "ipython", "content": "17"})),
    Conversation(({"role": "user", "content": "Hi"}, {"role": "user", "content": "again"})),
    Conversation(({"role": "assistant", "content": "I begin."}, {"role": "user", "content": "You do."})),
    Conversation(({"role": "developer", "content": "Be kind."}, _ASKED)),
    Conversation((_ASKED,), variables={"documents": [{"title": "Cusco", "text": "It is high."}]}),
    Conversation((_ASKED,), variables={"date_string": "01 Jan 2025", "enable_thinking": True}),
    Conversation((_ASKED,), variables={"enable_thinking": False}),
)
