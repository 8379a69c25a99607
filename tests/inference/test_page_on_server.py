"""The web chat on the real server, with the real engine: asked, asked again, opened anew."""

from tests.inference.serving import running
from tests.inference.test_page import Browser, driver, pytestmark  # noqa: F401 - a fixture, and when to skip

from trivium.inference.feedback import FeedbackStore
from trivium.inference.sessions import SessionStore


def test_the_page_talks_to_the_real_server(driver, tmp_path):  # noqa: F811
    store = SessionStore(tmp_path / "s.sqlite")
    feedback = FeedbackStore(tmp_path / "f.sqlite")
    with running(sessions=store, feedback=feedback) as server:
        server.asked = []
        browser = Browser(driver, type("At", (), {"url": server.url + "/", "asked": []})()).open()
        for text in ("hello there", "and?"):
            browser.one("#question").send_keys(text, "\n")
            browser.wait(lambda: "tokens" in browser.status())
            browser.idle()
        browser.press("Answer again")
        browser.wait(lambda: "2 of 2" in browser.one("#log").text)
        (session,) = store.sessions()
        assert [t.text for t in store.path(session.head)][::2] == browser.talk()[::2] == ["hello there", "and?"]
        assert len(store.turns(session.id)) == 5 and "were cached" in browser.status()
        browser.press("Good answer")
        browser.wait(lambda: feedback.stats()["standing"] == {"thumb": 1})
        browser.open()
        browser.one(".session").click()
        browser.wait(lambda: len(browser.talk()) == 4)
    store.close()
    feedback.close()
