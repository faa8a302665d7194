"""Modules of the page alone: server-sent events, answers, numbers."""

import pytest

pytestmark = [
    pytest.mark.browser,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(120),
]
STREAM = (
    ": waiting for a replica\n\ndata: one\r\ndata:two\r\n\r\nevent: error\rdata: {\"a\": 1}\r\r"
    ":\nid: 7\ndata\n\nevent: nothing\n\ndata:  three \n\ndata: incomplete\n"
)  # fmt: skip
EVENTS = [
    {"comment": "waiting for a replica"},
    {"event": "message", "data": "one\ntwo"},
    {"event": "error", "data": '{"a": 1}'},
    {"comment": ""},
    {"event": "message", "data": ""},
    {"event": "message", "data": " three "},
]
ANSWER = "Before\n\n```py\nx = '`'\n\n    ``` not a fence\n```\nBetween\n~~~\n```\n~~~\n```sh\nopen"
BLOCKS = [
    ["P", "Before"],
    ["PRE", "x = '`'\n\n    ``` not a fence"],
    ["P", "Between"],
    ["PRE", "```"],
    ["PRE", "open"],
]


async def run(page, module, script, *arguments):
    return await page.evaluate(
        f"async (given) => {{ const m = await import('/ui/static/{module}'); {script} }}", arguments
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_events_are_parsed_however_they_are_cut(page, size):
    script = """
        const [text, size] = given;
        const parser = new m.Parser();
        const found = [];
        for (let at = 0; at < text.length; at += size) {
            found.push(...parser.feed(text.slice(at, at + size)));
        }
        return found;"""
    assert await run(page, "sse.js", script, STREAM, size) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
async def test_an_answer_has_the_same_blocks_however_it_arrives(page, size):
    script = """
        const [text, size] = given;
        const answer = new m.Answer();
        for (let at = 0; at < text.length; at += size) {
            answer.append(text.slice(at, at + size));
            answer.draw();
        }
        const blocks = [...answer.root.querySelectorAll("p, pre")];
        return blocks.map((block) => [block.tagName, block.textContent]);"""
    assert await run(page, "answer.js", script, ANSWER, size) == BLOCKS


async def test_numbers_and_durations_are_short_and_unknown_ones_are_a_dash(page):
    script = """
        return [
            [null, 0, 0.0042, 0.183, 0.9996, 1.5, 12.34, 59.96, 125].map(m.seconds),
            [null, 0, 0.01, 0.4, 9.94, 9.96, 18200].map(m.rate),
            [null, 0, 119, 121, 7300, 200000].map(m.age),
            [null, 0, 0.333, 1].map(m.share),
            [null, 0, 1234567].map(m.count),
        ];"""
    assert await run(page, "format.js", script) == [
        ["–", "0 s", "4.2 ms", "183 ms", "1.00 s", "1.50 s", "12.3 s", "1 min 00 s", "2 min 05 s"],
        ["–", "0", "<0.1", "0.4", "9.9", "10", "18,200"],
        ["–", "0 s", "119 s", "2 min", "2 h", "2 d"],
        ["–", "0%", "33%", "100%"],
        ["–", "0", "1,234,567"],
    ]


async def test_the_cosine_of_two_vectors(page):
    script = "return [m.cosine([3, 0], [0.6, 0.8]), m.cosine([1, 1], [-1, -1]), m.cosine([0], [1])]"
    same, opposite, zero = await run(page, "embeddings.js", script)
    assert same == pytest.approx(0.6)
    assert opposite == pytest.approx(-1)
    assert zero == 0
