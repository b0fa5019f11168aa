"""Long and hostile output, from a stub: it stays text, and the page stays smooth."""

import random

import pytest
from page_driver import Playground, figure_of, merged, shades_of, text_of
from page_stub import MODEL, StubServer, token

HOSTILE = [
    "<img src=x onerror=\"document.title='run'\">",
    "<script>document.title='run'</script>",
    "&lt;b&gt; </span></div></article> \u202eabc\u0000\x1b[31m",
    "😀\n\n  indented\t|\r\n",
]
LONG_TASK_MS = 2000  # by the clock, on cores that others hold too; with a core of its own the longest is a tenth of it
MAX_CPU_S = 8.0  # of the page's thread, eight times what it takes; what grows with the square of the text takes minutes
NUM_BYTES = 50_000
SOURCES = ("head", "history", "ngram", "prediction", "grammar")

OBSERVE = """
    window.longTasks = [];
    new PerformanceObserver((list) => window.longTasks.push(...list.getEntries().map((entry) => entry.duration)))
        .observe({ type: "longtask", buffered: true });
    window.numFrames = 0;
    const count = () => { window.numFrames += 1; requestAnimationFrame(count); };
    requestAnimationFrame(count);
"""


def hostile():
    rejected = [{"token_id": 2, "text": text, "source": "head", "chance": 0.25} for text in HOSTILE]
    yield [token("", "head"), token(HOSTILE[0], "head"), token(HOSTILE[1], rejected=rejected)]
    yield [token(text, "ngram", forward) for forward, text in enumerate(HOSTILE[2:], 1)]


def long_answer():
    """Each forward with drafts of some source, as fast as it can be read."""
    rng, num, forward = random.Random(0), 0, 0
    while num < NUM_BYTES:
        texts = ["".join(rng.choices("abcdef ,.\n", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
        rejected = [{"token_id": 2, "text": "no", "source": "head", "chance": 0.5}] if rng.random() < 0.2 else []
        source = rng.choice(SOURCES)
        yield [*(token(text, source, forward) for text in texts), token("x ", "target", forward, rejected=rejected)]
        num += sum(map(len, texts)) + 2
        forward += 1


def cpu_clock(page):
    """Gives the CPU seconds of the page's main thread since now, which do not depend on who else wants the cores."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def clock():
        metrics = {item["name"]: item["value"] for item in session.send("Performance.getMetrics")["metrics"]}
        return metrics["TaskDuration"]

    start = clock()
    return lambda: clock() - start


@pytest.fixture(scope="module")
def hostile_server():
    server = StubServer(hostile, names=["<img src=x onerror=alert(1)>"])
    yield server
    server.stop()


@pytest.fixture(scope="module")
def long_server():
    server = StubServer(long_answer)
    yield server
    server.stop()


def test_html_of_a_model_is_text_everywhere(hostile_server, open_page):
    play = Playground(open_page(hostile_server.url))
    (answer,) = play.ask("<u>prompt</u>")
    assert text_of(answer) == "".join(HOSTILE)
    assert shades_of(answer) == merged([("head", HOSTILE[0]), ("target", HOSTILE[1]), ("ngram", "".join(HOSTILE[2:]))])
    answer.locator(".struck").hover()
    card = play.page.locator("#card")
    card.locator("del").first.wait_for()
    assert card.locator("del").all_text_contents()[1] == HOSTILE[1].replace(" ", "␣")
    assert answer.locator("h2").text_content() == MODEL
    play.page.locator("[name=model]").select_option(label="<img src=x onerror=alert(1)>")
    play.page.get_by_role("button", name="<u>title</u>").click()
    assert play.page.locator("#prompt").input_value() == "<s>prompt</s>"
    assert play.page.locator("main img, main script, main u, main s, #card img").count() == 0
    assert play.page.title() == "specserve"


def test_fifty_kilobytes_are_drawn_whole_in_few_elements_and_no_long_task(long_server, open_page):
    play = Playground(open_page(long_server.url))
    play.page.evaluate(OBSERVE)
    cpu_s = cpu_clock(play.page)
    (answer,) = play.ask("Write much")
    trace = [entry for event in long_answer() for entry in event]
    assert text_of(answer) == "".join(entry["text"] for entry in trace)
    assert len(text_of(answer)) >= NUM_BYTES
    assert figure_of(answer, "tokens") == f"{len(trace):,}"
    num_elements = answer.locator(".output").evaluate("output => output.querySelectorAll('*').length")
    assert num_elements < 0.75 * len(trace)
    assert play.page.evaluate("window.numFrames") > 10 and cpu_s() < MAX_CPU_S
    assert max(play.page.evaluate("window.longTasks"), default=0) < LONG_TASK_MS
