"""The web chat in a browser: streaming, branches, comparing, the keyboard, a phone; and nothing that a model says runs.

The server here is a small one with real sessions and scripted answers, sent as OpenAI's API does.
"""

import asyncio
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

import trivium.inference
from trivium.data.chat import Chat
from trivium.data.config import BPEConfig
from trivium.data.tokenizer import train_bpe
from trivium.errors import SessionError
from trivium.inference.exchange import Answer, begin
from trivium.inference.sessions import SessionStore

fastapi = pytest.importorskip("fastapi", reason="THE PAGE IS NOT TESTED: no fastapi")
uvicorn = pytest.importorskip("uvicorn", reason="THE PAGE IS NOT TESTED: no uvicorn")
webdriver = pytest.importorskip("selenium.webdriver", reason="THE PAGE IS NOT CHECKED IN A BROWSER: no selenium")
from fastapi import Request  # noqa: E402
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from trivium.inference.session_routes import session_routes  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="THE PAGE IS NOT CHECKED IN A BROWSER: chromium and chromedriver are not on the path "
    "(Debian: apt-get install chromium chromium-driver)",
)
PAGE = Path(trivium.inference.__path__[0]) / "page"
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
ATTACK = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">
[a](javascript:window.hacked=3) [b](JaVaScRiPt:alert(1)) [c](data:text/html,<script>window.hacked=4</script>)
[d](https://example.org/?q="onmouseover="window.hacked=5) <https://e.org/"><script>window.hacked=6</script>
**<svg onload=window.hacked=7>** `<iframe srcdoc="<script>parent.hacked=8</script>">`
```html" onclick="window.hacked=9
<script>window.hacked = 10</script>
```
<style>*{display:none}</style><base href="//evil.example">
<form action=javascript:window.hacked=11><button>x</button></form>
"""
MARKDOWN = """# Title

Some **bold *and slanted* text**, `a < b`, 2 * 3 * 4, snake_case_name, ~~gone~~ and https://example.org/a_b_c.

- one
  - inner
- two

3. three
4. four

> quoted

```python
print("<b>")
```
"""


class Server:
    """Real sessions, scripted answers."""

    def __init__(self, folder):
        self.tokenizer = train_bpe(BPEConfig(vocab_size=300), ["hello there, the cat sat on the mat"] * 3)
        self.store, self.chat = SessionStore(folder / "s.sqlite"), Chat(self.tokenizer)
        self.answers, self.asked, self.given, self.pause, self.cut, self.keeps = [], [], [], 0.0, False, True
        app = fastapi.FastAPI()
        app.include_router(session_routes(self.store, self.chat, "m", self.tokenizer.fingerprint))

        @app.middleware("http")
        async def gate(request: Request, answer):
            hidden = not self.keeps and request.url.path.startswith("/v1/sessions")
            return JSONResponse({"error": {"message": "Not Found"}}, 404) if hidden else await answer(request)

        @app.get("/v1/models")
        def models():
            return {"object": "list", "data": [{"id": "tiny", "object": "model"}]}

        @app.post("/v1/feedback")
        async def feedback(request: Request):
            self.given.append(await request.json())
            return {"object": "feedback"}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            body = await request.json()
            self.asked.append(body)
            if not self.keeps:
                return StreamingResponse(self.events(body, None), media_type="text/event-stream")
            try:
                session = self.store.get(body["session"])
                self.store.check(session, "m", self.tokenizer.fingerprint)
                parent = body.get("parent", session.head) or None
                exchange = begin(
                    self.store, session, self.chat, body["messages"], parent=parent, context=10_000, wanted=10
                )
            except SessionError as error:
                return JSONResponse({"error": {"message": str(error)}}, error.status)
            return StreamingResponse(self.events(body, exchange), media_type="text/event-stream")

        @app.get("/")
        def index():
            return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})

        @app.get("/{name}")
        def file(name: str):
            return FileResponse(PAGE / name) if (PAGE / name).is_file() else JSONResponse({}, 404)

        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        config = uvicorn.Config(app, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()

    async def events(self, body, exchange):
        n = body.get("n", 1)
        id = f"chatcmpl-{len(self.asked)}"
        texts = [self.answers.pop(0) if self.answers else f"answer {len(self.asked)}" for _ in range(n)]

        def chunk(choices, **more):
            told = {"id": id, "object": "chat.completion.chunk", "choices": choices, **more}
            return f"data: {json.dumps(told)}\n\n"

        for i, text in enumerate(texts):
            for at in range(0, len(text), 5):
                yield chunk([{"index": i, "delta": {"content": text[at : at + 5]}, "finish_reason": None}])
                await asyncio.sleep(self.pause)
            yield chunk([{"index": i, "delta": {}, "finish_reason": "stop"}])
        if self.cut:
            return
        answers = []
        for i, text in enumerate(texts):
            drawn = [*self.tokenizer.encode(text), self.tokenizer.eot_id]
            answers.append(Answer(drawn, "stop", {"seconds": 0.5}, f"{id}-{i}" if i else id))
        if exchange is not None:
            exchange.commit(answers)
        count = sum(len(a.drawn) for a in answers)
        yield chunk([], usage={"prompt_tokens": 12, "completion_tokens": count, "total_tokens": count + 12})
        yield "data: [DONE]\n\n"

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()
        self.store.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    yield made
    made.close()


class Browser:
    """What a person does."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def open(self, width=1100, height=800, scheme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get("about:blank")
        self.driver.get(self.server.url)
        self.wait(lambda: self.js("return document.body.dataset.ready"))
        return self

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def wait(self, met):
        return WebDriverWait(self.driver, 20, 0.05).until(lambda _: met())

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector):
        return self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)

    def key(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def idle(self):
        self.wait(lambda: not self.js("return document.getElementById('send').hidden"))

    def say(self, text):
        count = len(self.server.asked)
        self.one("#question").send_keys(text, Keys.ENTER)
        self.wait(lambda: len(self.server.asked) > count)
        self.idle()

    def press(self, text, within="body"):
        self.js(
            "[...document.querySelector(arguments[1]).querySelectorAll('button')]"
            ".filter(b => b.innerText === arguments[0] || b.ariaLabel === arguments[0]).at(-1).click()",
            text,
            within,
        )

    def talk(self):
        return self.texts("#log .text")

    def status(self):
        return self.one("#status").text


@pytest.fixture
def browser(driver, server):
    made = Browser(driver, server)
    driver.get_log("browser")
    yield made.open()
    said = [entry["message"] for entry in driver.get_log("browser")]
    assert [line for line in said if "favicon" not in line and "status of 4" not in line] == []


def test_answers_are_streamed_and_kept_by_the_server(browser, server):
    server.pause, server.answers = 0.15, ["one two three four five six"]
    browser.one("#question").send_keys("hello", Keys.ENTER)
    browser.wait(lambda: "one" in "".join(browser.talk()))
    assert browser.talk()[-1] != "one two three four five six", "text shows before the answer is whole"
    assert browser.one("#log").get_attribute("aria-busy") == "true"
    browser.idle()
    assert browser.talk() == ["hello", "one two three four five six"]
    assert browser.one("#log").get_attribute("aria-busy") == "false"
    assert "tokens/s" in browser.status() and "12 read" in browser.status()
    server.pause = 0
    browser.say("and?")
    (session,) = server.store.sessions()
    path = server.store.path(session.head)
    assert (
        [turn.text for turn in path] == browser.talk() == ["hello", "one two three four five six", "and?", "answer 2"]
    )
    assert server.asked[1]["messages"] == [{"role": "user", "content": "and?"}], "history is not sent again"
    assert server.asked[1]["parent"] == path[1].id
    assert browser.one("#title").text == "hello" == browser.one(".session").text
    browser.open()
    browser.one(".session").click()
    browser.wait(lambda: len(browser.talk()) == 4)


def test_nothing_that_a_model_says_runs_or_becomes_an_element(browser, server):
    server.answers = [ATTACK, ATTACK, ATTACK]
    browser.say(ATTACK.replace("\n", " "))
    browser.open()
    browser.one(".session").click()
    browser.wait(lambda: len(browser.talk()) == 2)
    time.sleep(0.3)
    assert browser.js("return window.hacked") is None
    made = browser.js(
        "return [...document.querySelectorAll('#log .text *')]"
        ".map(e => [e.localName, [...e.attributes].map(a => a.name)])"
    )
    allowed = {"p", "br", "a", "strong", "em", "code", "pre", "figure", "figcaption", "span", "button", "del"}
    assert {name for name, _ in made} <= allowed
    assert {a for _, names in made for a in names} <= {"class", "href", "target", "rel", "type", "tabindex"}
    hrefs = browser.js("return [...document.querySelectorAll('#log a')].map(a => a.href)")
    assert hrefs and all(href.startswith("https://") for href in hrefs)
    for part in (
        "<script>window.hacked = 1</script>",
        "javascript:window.hacked=3",
        "<script>window.hacked = 10</script>",
    ):
        assert part in browser.talk()[1], "it is shown as it was said"
    title = browser.one(".session").text
    assert title.startswith("<script>")


def test_markdown_is_shown_as_meant(browser, server):
    server.answers = [MARKDOWN]
    browser.say("hello")
    html = browser.js("return document.querySelector('.assistant .text').innerHTML")
    for part in (
        "<h3>Title</h3>", "<strong>bold <em>and slanted</em> text</strong>", "<code>a &lt; b</code>", "2 * 3 * 4",
        "snake_case_name", "<del>gone</del>", 'href="https://example.org/a_b_c"', "</a>.",
        "<ul><li>one<ul><li>inner</li></ul></li><li>two</li></ul>", '<ol start="3"><li>three</li><li>four</li></ol>',
        "<blockquote><p>quoted</p></blockquote>", "<span>python</span>", '<code>print("&lt;b&gt;")</code>',
    ):  # fmt: skip
        assert part in html, part


def test_markdown_of_any_text_ends(browser):
    """Texts on which a careless pattern takes exponential time, and the browser gives up; no word is lost."""
    lost = browser.js("""
        return import('/markdown.js').then(({markdown}) => {
          const texts = ['*'.repeat(50000), '**a'.repeat(6000), '['.repeat(20000), '`'.repeat(20000), '_a'.repeat(9000),
                         '> '.repeat(20000), '- a\\n'.repeat(20000), '  '.repeat(300) + '- a', 'http://'.repeat(2800),
                         '[a]('.repeat(5000), '~~a'.repeat(6000), '```\\na\\n'.repeat(9999), '# a'.repeat(9999)];
          const count = text => text.split('a').length;
          return texts.map(text => [text.slice(0, 4), count(text) - count(markdown(text).textContent)]);
        })""")
    assert [name for name, missing in lost if missing] == [], lost


def test_stop_keeps_nothing_and_gives_the_question_back(browser, server):
    browser.say("first")
    server.pause, server.answers = 0.2, ["a long answer " * 20]
    browser.one("#question").send_keys("hello", Keys.ENTER)
    browser.wait(lambda: "a long" in browser.talk()[-1])
    browser.key(Keys.ESCAPE)
    browser.idle()
    assert browser.talk() == ["first", "answer 1"] and browser.one("#question").get_attribute("value") == "hello"
    assert browser.status() == "Stopped; nothing of it is kept."
    (session,) = server.store.sessions()
    assert [turn.text for turn in server.store.turns(session.id)] == ["first", "answer 1"]


def test_a_lost_connection_is_told_and_the_question_comes_back(browser, server):
    server.cut = True
    browser.one("#question").send_keys("hello", Keys.ENTER)
    browser.wait(lambda: browser.status() == "the answer was cut off; the turn is not kept")
    assert browser.one("#question").get_attribute("value") == "hello"
    server.cut = False
    browser.key(Keys.ENTER)
    browser.wait(lambda: browser.talk() == ["hello", "answer 2"])


def test_again_and_edit_make_branches_to_go_back_to(browser, server):
    browser.say("q1")
    browser.press("Answer again")
    browser.wait(lambda: len(server.asked) == 2)
    browser.idle()
    assert browser.talk() == ["q1", "answer 2"] and "2 of 2" in browser.one(".assistant .tools").text
    browser.press("Earlier version", ".assistant")
    browser.wait(lambda: browser.talk() == ["q1", "answer 1"])
    browser.press("Edit")
    browser.key(Keys.CONTROL, "a")
    browser.one("article textarea").clear()
    browser.one("article textarea").send_keys("q1 edited", Keys.ENTER)
    browser.wait(lambda: len(server.asked) == 3)
    browser.idle()
    assert browser.talk() == ["q1 edited", "answer 3"]
    browser.press("Earlier version", ".user")
    browser.wait(lambda: browser.talk() == ["q1", "answer 2"])
    browser.say("on")
    (session,) = server.store.sessions()
    assert [t.text for t in server.store.path(session.head)] == ["q1", "answer 2", "on", "answer 4"]
    assert len(server.store.turns(session.id)) == 7


def test_two_answers_are_compared_and_the_better_one_goes_on(browser, server):
    browser.press("Settings")
    browser.js(
        "const n = document.getElementById('n'); n.value = '2'; n.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    server.answers = ["left", "right"]
    browser.say("which?")
    assert server.asked[0]["n"] == 2 and server.asked[0]["temperature"] == 0.8
    assert browser.texts(".compared .text") == ["left", "right"]
    browser.press("Answer 2 is better")
    browser.wait(lambda: server.given)
    assert server.given == [{"id": "chatcmpl-1-1", "kind": "preference", "value": ["chatcmpl-1-1", "chatcmpl-1"]}]
    browser.wait(lambda: browser.talk() == ["which?", "right"])
    browser.js("localStorage.clear()")
    (session,) = server.store.sessions()
    assert session.head == "chatcmpl-1-1"


def test_thumbs_are_given_and_taken_back(browser, server):
    browser.say("hello")
    for label in ("Good answer", "Good answer", "Bad answer"):
        count = len(server.given)
        browser.press(label)
        browser.wait(lambda count=count: len(server.given) > count)
        browser.wait(lambda: "kept" in browser.status() or "back" in browser.status())
    said = [(given["id"], given["kind"], given["value"]) for given in server.given]
    assert said == [("chatcmpl-1", "thumb", value) for value in ("up", "none", "down")]


def test_conversations_are_listed_opened_and_deleted(browser, server):
    browser.say("first")
    browser.press("New conversation")
    browser.say("second")
    browser.wait(lambda: browser.texts(".session") == ["second", "first"])
    browser.js("window.confirm = () => true")
    browser.press("Delete first")
    browser.wait(lambda: browser.texts(".session") == ["second"])
    assert [s.title for s in server.store.sessions()] == ["second"]
    assert browser.talk() == ["second", "answer 2"]


def test_a_conversation_with_another_model_goes_on_in_a_copy_only(browser, server):
    browser.say("hello")
    with server.store._db.transaction() as db:
        db.execute("UPDATE sessions SET model = 'other'")
    browser.open()
    browser.one(".session").click()
    browser.wait(lambda: "held with another model" in browser.one("#log").text)
    browser.one("#question").send_keys("on", Keys.ENTER)
    browser.wait(lambda: "go on in a copy" in browser.status())
    assert len(server.asked) == 1
    browser.press("Go on in a copy")
    browser.wait(lambda: len(browser.texts(".session")) == 2)
    browser.one("#question").clear()
    browser.say("on")
    assert browser.talk() == ["hello", "answer 1", "on", "answer 2"]


def test_all_of_it_can_be_done_with_the_keyboard(browser, server):
    """Shift+Enter is a line; Tab reaches every control in the order of the page; focus is seen and comes back."""
    browser.key("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two", Keys.ENTER)
    browser.wait(lambda: server.asked)
    browser.idle()
    assert server.asked[0]["messages"][0]["content"] == "one\ntwo"
    assert browser.js("return document.activeElement.id") == "question"
    browser.js("document.querySelector('.skip').focus()")
    order, outlines = [], []
    for _ in range(13):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        order.append(browser.js("const e = document.activeElement; return e.id || e.ariaLabel || e.innerText"))
        outlines.append(browser.js("return getComputedStyle(document.activeElement).outlineStyle"))
    for name in ("tune", "new", "Edit", "Good answer", "Answer again", "question", "send"):
        assert name in order, (name, order)
    assert order.index("tune") < order.index("new") < order.index("Edit") < order.index("Good answer")
    assert order.index("Good answer") < order.index("question") < order.index("send")
    assert all(outline != "none" for outline in outlines[: order.index("send") + 1]), outlines


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_page_fits_and_can_be_read(browser, server, width, scheme):
    long = "a" * 300
    server.answers = [MARKDOWN + f"\n{long}\n\n```\n{'wide ' * 60}\n```\n"]
    browser.say(f"hello {long}")
    browser.open(width, 800, scheme)
    if width < 700:
        browser.press("Conversations")
        assert browser.one("nav").is_displayed()
    browser.one(".session").click()
    browser.wait(lambda: len(browser.talk()) == 2)
    assert browser.js("return document.documentElement.scrollWidth") <= width
    assert browser.js("return document.getElementById('log').scrollWidth <= document.getElementById('log').clientWidth")
    out = browser.js("""
        return [...document.querySelectorAll('button, textarea, article')].filter(e => e.offsetParent)
            .filter(e => { const r = e.getBoundingClientRect(); return r.right > innerWidth + 1 || r.left < -1; })
            .map(e => e.outerHTML.slice(0, 80))""")
    assert out == []
    contrast = browser.js("""
        const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => (v /= 255) <= .03928 ? v / 12.92
            : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
        const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
        const all = '#log p, #log .user .text, #log .tools button, .rate, h1, .session, #send, #keys, a';
        return [...document.querySelectorAll(all)].filter(e => e.offsetParent && !e.disabled).map(e => {
            const [a, b] = [getComputedStyle(e).color, back(e)].map(light);
            return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 60)]; })""")
    assert [entry for entry in contrast if entry[0] < 4.5] == []


def test_a_server_without_sessions_gets_the_whole_history(browser, server):
    """The page then keeps the tree itself."""
    server.keeps = False
    browser.open()
    assert not browser.one("nav").is_displayed()
    browser.js("document.getElementById('system').value = 'be kind'")
    browser.say("one")
    browser.say("two")
    browser.press("Answer again")
    browser.wait(lambda: len(server.asked) == 3)
    browser.idle()
    said = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one"},
            {"role": "assistant", "content": "answer 1"}, {"role": "user", "content": "two"}]  # fmt: skip
    assert [body["messages"] for body in server.asked] == [said[:2], said, said]
    assert not any("session" in body for body in server.asked)
    assert browser.talk() == ["one", "answer 1", "two", "answer 3"]
    browser.press("Earlier version", ".assistant:last-child")
    browser.wait(lambda: browser.talk()[-1] == "answer 2")
