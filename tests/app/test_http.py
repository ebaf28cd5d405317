"""The server: who reaches what, how much, how many at once; and that requests do not touch one another."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from gradio_client import Client
from PIL import Image

from tests.app.calls import HTTP, QUICK, call, create_data, get_raw, run_function
from tests.app.conftest import SECRET, make_studio
from untwine.app.create import create
from untwine.app.jobs import Job
from untwine.app.requests import Request
from untwine.app.server import check_reach, serve

pytestmark = pytest.mark.xdist_group("studio")  # one server and two short runs for all of it
watched: list[tuple[str, str]] | None = None


def _watch(event: str, args: tuple) -> None:
    if watched is not None and event in ("open", "os.scandir", "os.listdir") and args and isinstance(args[0], str):
        watched.append((event, os.path.realpath(args[0])))


sys.addaudithook(_watch)


def attacks(ground, port: int) -> list[str]:
    """Thirty ways to name a file that is none of your business; ``secret`` is a real one beside the roots."""
    secret, name = str(ground / "outside" / "secret.txt"), "outside/secret.txt"
    found = [
        secret,
        f"../{name}",
        f"../../{name}",
        f"root/../../{name}",
        f"saved:../{name}",
        "saved:../outside/stolen",
        "saved:linked",
        "saved:inner",
        "run:../outside/stolen",
        "run:first/../../outside",
        "first/../../outside",
        "../../../../../../../../etc/passwd",
        "/etc/passwd",
        "//etc/passwd",
        "/etc/passwd\x00.png",
        f"{secret}\x00",
        "..\\..\\outside\\secret.txt",
        "\\\\127.0.0.1\\share\\secret",
        "C:\\Windows\\win.ini",
        "%2e%2e%2f%2e%2e%2foutside%2fsecret.txt",
        "..%2f..%2foutside%2fsecret.txt",
        "%252e%252e%252foutside%252fsecret.txt",
        "..%c0%af..%c0%afoutside%c0%afsecret.txt",
        "....//....//outside/secret.txt",
        ".;/..;/outside/secret.txt",
        f"file://{secret}",
        "~/.bashrc",
        "/proc/self/environ",
        f"http://127.0.0.1:{port}/secret",
        f"{ground}/root/linked/model_index.json",
    ]
    assert len(set(found)) == 30
    return found


@pytest.fixture(scope="module")
def listener():
    """Counts who connects: nobody should."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        yield server


def test_thirty_attacks_read_nothing_outside_of_the_roots(server, ground, listener):
    global watched
    port, outputs = listener.getsockname()[1], str(server.studio.outputs.folder)
    call(server.url, "create", create_data())  # whatever is loaded once is loaded
    lists = range(4)  # of checkpoints: to create, watch, share and measure
    assert all(run_function(server, "changed", ["ddt-digits", None], nth).status_code == 200 for nth in lists)
    watched = []
    answers = []
    try:
        for attack in attacks(ground, port):
            kind, _ = call(server.url, "create", create_data(attack))
            assert kind == "error", attack
            file = {"path": attack, "url": attack, "meta": {"_type": "gradio.FileData"}}
            assert call(server.url, "create", create_data(file))[0] in ("error", "400", "422", "500")
            given = (
                ("look", [attack, attack, 4]),
                ("read", [attack]),
                *(("changed", [attack, None], nth) for nth in lists),
            )
            for name, *rest in given:
                answer = run_function(server, name, *rest)
                assert answer.status_code == 500, (name, attack)
                answers.append(answer.content)
            for target in (quote(attack), quote(f"{outputs}/{attack}"), attack.replace("\x00", "%00").replace(" ", "")):
                for route in ("file=", "file/", "static/", "assets/"):
                    prefix = "" if route in ("static/", "assets/") else "gradio_api/"
                    status, body = get_raw(server.url, f"/{prefix}{route}{target}")
                    assert status in (400, 403, 404), (route, target)
                    answers.append(body)
        read = list(watched)
    finally:
        watched = None
    private = (str(ground / "outside"), "/etc/passwd", "/proc/self/environ", os.path.expanduser("~/.bashrc"))
    assert [path for event, path in read if event == "open" and path.startswith(private)] == []
    assert not any(SECRET.encode() in body or b"root:x:" in body for body in answers)
    with pytest.raises(TimeoutError):
        listener.accept()


def test_the_watch_over_reads_can_fail(ground):
    global watched
    watched = []
    (ground / "root" / "linked" / "model_index.json").read_text()
    read, watched = list(watched), None
    assert any(path.startswith(str(ground / "outside")) for _, path in read)


def test_links_that_lead_out_are_not_followed(server, ground):
    known = server.studio.catalog.checkpoints()
    assert "saved:linked" not in known
    assert "saved:inner" in known  # listed from its own files, but not opened
    kind, _ = call(server.url, "create", create_data("saved:inner"))
    assert kind == "error"
    assert call(server.url, "create", create_data("saved:mine"))[0] == "complete"


@pytest.mark.parametrize(
    "route",
    [
        *("upload", "proxy=http://127.0.0.1/", "stream/a/b/c/playlist.m3u8", "process_recording", "vibe-edit/", "runs"),
        *(
            "component_server",
            "deep_link",
            "run-history/records",
            "dev/reload",
            "profiling/traces",
            "custom_component/a",
        ),
    ],
)
def test_routes_without_a_use_do_not_exist(server, route):
    for method in ("GET", "POST"):
        assert HTTP.request(method, f"{server.url}gradio_api/{route}").status_code == 404
    assert HTTP.get(f"{server.url}monitoring").status_code == 404


def test_nothing_can_be_uploaded(server):
    answer = HTTP.post(f"{server.url}gradio_api/upload", files={"files": ("a.png", b"x" * 100)})
    assert answer.status_code == 404


def test_large_bodies_are_refused_at_once(server):
    body = b'{"data": ["' + b"x" * 2**20 + b'"]}'
    answer = HTTP.post(f"{server.url}gradio_api/call/create", content=body)
    assert answer.status_code == 413 and "256 KiB" in answer.text

    def parts():
        for _ in range(64):
            yield b"x" * 2**14

    try:  # without a length it is cut off, and the client may or may not hear why
        status = HTTP.post(f"{server.url}gradio_api/call/create", content=parts()).status_code
    except httpx.HTTPError:
        status = 400
    assert status >= 400
    assert call(server.url, "create", create_data())[0] == "complete"


@pytest.mark.parametrize("changes", [{"steps": 10**9}, {"height": 65536, "width": 65536}, {"count": 10**6}])
def test_what_is_too_much_is_refused_before_it_is_computed(server, changes):
    started = time.perf_counter()
    kind, _ = call(server.url, "create", create_data(**changes))
    assert kind == "error" and time.perf_counter() - started < 3


def test_the_headers_keep_the_page_to_itself(server):
    headers = HTTP.get(server.url).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"]


def test_queued_functions_cannot_go_past_the_queue(server):
    answer = HTTP.post(f"{server.url}gradio_api/run/create", json={"data": create_data()})
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("host", "share", "auth"), [("0.0.0.0", False, None), ("192.168.1.2", False, None), ("127.0.0.1", True, None)]
)
def test_others_need_a_password(host, share, auth, caplog):
    with pytest.raises(ValueError, match="set auth"):
        check_reach(host, auth, share)
    check_reach(host, ("me", "secret"), share)
    assert "others can reach this page" in caplog.text


def test_this_machine_needs_none(caplog):
    for host in ("127.0.0.1", "localhost", "::1"):
        check_reach(host, None, share=False)
    assert not caplog.text
    with pytest.raises(ValueError, match="user:password"):
        check_reach("127.0.0.1", ("me", ""), share=False)


def test_a_password_closes_the_page_and_a_full_queue_says_so(ground, tmp_path):
    """One more server, with a queue of two and a password."""
    studio = make_studio(ground, tmp_path / "outputs", max_queue=2)
    with serve(studio, auth=("me", "secret")) as server:
        assert HTTP.get(f"{server.url}config").status_code == 401
        assert call(server.url, "create", create_data())[0] == "401"
        client = Client(server.url, auth=("me", "secret"), verbose=False)
        with studio.jobs.run("somebody"):  # nothing goes on meanwhile
            first = client.submit(*create_data(), api_name="/create")
            _until(lambda: len(_queue(server)) == 0 and _active(server) == 1)
            waiting = [client.submit(*create_data(), api_name="/create") for _ in range(2)]
            _until(lambda: len(_queue(server)) == 2)
            with pytest.raises(Exception, match="Queue is full"):
                client.predict(*create_data(), api_name="/create")
        assert all(job.result(60) for job in (first, *waiting))


def _queue(server):
    return server.page._queue


def _active(server) -> int:
    return sum(job is not None for job in server.page._queue.active_jobs)


def _until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


FRESH = """
import hashlib, sys
import numpy as np, torch
torch.set_num_threads(1)
from untwine.app.create import create
from untwine.app.jobs import Job
from untwine.app.requests import Request
from untwine.app.studio import Studio
studio = Studio(outputs=sys.argv[1])
made = create(studio, Request.read(studio, "ddt-digits", count=4, steps=12, seed=9), Job(""))
print(hashlib.sha256(np.load(made.files[0])["arr_0"].tobytes()).hexdigest())
"""


def test_cancel_stops_within_two_steps_and_the_next_image_is_that_of_a_fresh_process(server, tmp_path, monkeypatch):
    client, jobs = Client(server.url, verbose=False), server.studio.jobs
    before = len(server.studio.outputs.sets())
    running = client.submit(*create_data(steps=250, count=16), api_name="/create")
    _until(lambda: jobs._running is not None and jobs._running.done >= 3)
    job, at = jobs._running, []
    ask = job.stop.set
    monkeypatch.setattr(job.stop, "set", lambda: (ask(), at.append(job.done)))  # steps until the request is there count
    told = client.predict(api_name="/cancel")
    assert f"Stopped after step {job.done} of 250" in told
    assert job.done - at[0] <= 2
    with pytest.raises(Exception, match="Stopped after step"):
        running.result(30)
    assert jobs._running is None and len(server.studio.outputs.sets()) == before
    files = client.predict(*create_data(count=4, steps=12, seed=9, high=0.7), api_name="/create")[1]
    images = np.load(next(f for f in files if f.endswith(".npz")))["arr_0"]
    command = [sys.executable, "-c", FRESH, str(tmp_path / "out")]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert hashlib.sha256(images.tobytes()).hexdigest() == fresh


def test_a_closed_tab_stops_its_job(server):
    jobs, session = server.studio.jobs, "gone"
    heard = threading.Thread(
        target=_listen_for, args=(server.url, session, lambda: (jobs._running or Job("")).done >= 2)
    )
    heard.start()
    time.sleep(0.3)  # the heartbeat is there before the job
    kind, _ = call(server.url, "create", create_data(steps=250, count=16), session=session)
    heard.join()
    assert kind == "error" and jobs._running is None


def _listen_for(url: str, session: str, until) -> None:
    """What an open tab does, and closes when ``until`` comes true."""
    with httpx.Client(timeout=60) as client, client.stream("GET", f"{url}gradio_api/heartbeat/{session}"):
        _until(until)


def test_fifty_at_once_give_what_each_gives_alone(server, ground, tmp_path):
    wanted = [{"seed": k, "label": k % 10, "count": 1 + k % 3, "steps": 2 + k % 4} for k in range(50)]
    with ThreadPoolExecutor(50) as people:
        answers = list(people.map(lambda w: call(server.url, "create", create_data(**w)), wanted))
    assert [kind for kind, _ in answers] == ["complete"] * 50
    alone = make_studio(ground, tmp_path / "alone")
    own = {"guidance": QUICK["guidance"], "guidance_from": 0, "guidance_to": 0.7}
    for request, (_, (gallery, *_)) in zip(wanted, answers):
        expected = create(alone, Request.read(alone, "ddt-digits", **request, **own), Job("")).pictures
        assert len(gallery) == request["count"] == len(expected)
        for item, (path, _) in zip(gallery, expected):
            served = HTTP.get(item["image"]["url"]).content
            with Image.open(io.BytesIO(served)) as picture, Image.open(path) as own_picture:
                assert picture.text == own_picture.text
                assert np.array_equal(np.asarray(picture), np.asarray(own_picture))


def test_an_error_inside_gives_a_number_and_nothing_else(server, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("/home/me/secret: PASSWORD=1")

    monkeypatch.setattr(server.studio, "pipe", broken)
    client = Client(server.url, verbose=False)
    with pytest.raises(Exception, match="under error") as told:
        client.predict(*create_data(), api_name="/create")
    assert "PASSWORD" not in str(told.value) and "/home" not in str(told.value)
    assert "PASSWORD" in caplog.text
