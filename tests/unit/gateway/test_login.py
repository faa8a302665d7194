"""Logging in to the console: the form, the cookie, and forms of other sites."""

from __future__ import annotations

import base64
import hashlib
import re
from http.cookies import SimpleCookie

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from kubeai._keys import Key
from kubeai.gateway import login
from kubeai.gateway.denials import admin_required
from kubeai.openai.errors import ErrorResponse
from kubeai.routing.keys import KeyRecord

ADMIN, USER, ODD = "sk-admin", "sk-user", 'sk;"odd'


def key(name, *, is_admin):
    return Key(KeyRecord(name, hashlib.sha256(name.encode()).digest(), name, is_admin=is_admin))


class Gateway:
    def __init__(self):
        self.checked = []
        self.limited = False
        self.keys = {
            ADMIN.encode(): key("admin", is_admin=True),
            USER.encode(): key("user", is_admin=False),
            ODD.encode(): key("odd", is_admin=True),
        }

    def check(self, credential, address):
        self.checked.append((credential, address))
        if self.limited:
            raise ErrorResponse("Too many wrong keys.", status=429, retry_after_s=7)
        if credential not in self.keys:
            raise ErrorResponse("This <key> is not valid.", status=401, code="invalid_api_key")
        if not self.keys[credential].is_admin:
            raise admin_required()

    async def answer(self, request):
        try:
            return await login.answer(request, self.check)
        except ErrorResponse as error:
            return web.Response(body=error.body(), status=error.status)


@pytest.fixture
def gateway():
    return Gateway()


@pytest.fixture
async def client(gateway):
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", gateway.answer)
    async with TestClient(TestServer(app)) as client:
        yield client


async def post(client, body, path="/ui/login", kind=login.FORM_TYPE, **headers):
    headers = {"Content-Type": kind} | {k.replace("_", "-"): v for k, v in headers.items()}
    response = await client.post(path, data=body, headers=headers, allow_redirects=False)
    return response, await response.text()


async def test_an_admins_key_becomes_a_cookie_that_scripts_and_other_sites_cannot_use(
    client, gateway
):
    response, _ = await post(client, f"key={ADMIN}", X_Forwarded_For="192.0.2.7, 192.0.2.9")
    assert (response.status, response.headers["Location"]) == (303, "/ui/")
    (line,) = response.headers.getall("Set-Cookie")
    assert line == f"kubeai_key={ADMIN}; Path=/ui; HttpOnly; SameSite=Strict"
    assert SimpleCookie(line)["kubeai_key"].value == ADMIN
    assert response.headers["Cache-Control"] == "no-store"
    assert gateway.checked == [(ADMIN.encode(), "192.0.2.9")]


async def test_behind_https_the_cookie_is_never_sent_without(client):
    response, _ = await post(client, f"key={ADMIN}", X_Forwarded_Proto="https")
    assert "; Secure" in response.headers["Set-Cookie"]


async def test_logging_out_removes_the_cookie(client, gateway):
    response, _ = await post(client, "", path="/ui/logout")
    assert (response.status, response.headers["Location"]) == (303, "/ui/")
    assert response.headers["Set-Cookie"] == (
        "kubeai_key=; Path=/ui; HttpOnly; SameSite=Strict; Max-Age=0"
    )
    assert gateway.checked == []


@pytest.mark.parametrize("written", [f"+{ADMIN}+%0D%0A", f"%09{ADMIN}"])
async def test_white_space_from_copying_is_removed(client, written):
    response, _ = await post(client, f"key={written}")
    assert response.status == 303


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("wrong", 401, "This &lt;key&gt; is not valid."),
        ("", 401, "not valid"),
        (USER, 403, "needs the key of an administrator"),
        (ODD, 400, "characters that a browser cannot keep"),
    ],
)
async def test_another_key_shows_the_form_again_with_the_reason(client, text, status, words):
    response, page = await post(client, b"key=" + str(URL.build(query={"": text}))[2:].encode())
    assert response.status == status
    assert words in page
    assert 'action="/ui/login"' in page
    assert text not in page or not text
    assert "Set-Cookie" not in response.headers
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"


async def test_too_many_wrong_keys_say_when_to_try_again(client, gateway):
    gateway.limited = True
    response, page = await post(client, f"key={ADMIN}")
    assert (response.status, response.headers["Retry-After"]) == (429, "7")
    assert "Too many wrong keys." in page


@pytest.mark.parametrize("path", ["/ui/login", "/ui/logout"])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", ""])
async def test_forms_of_other_sites_are_refused(client, gateway, path, origin):
    response, text = await post(client, f"key={ADMIN}", path=path, Origin=origin)
    assert response.status == 403
    assert "foreign_origin" in text
    assert gateway.checked == []


async def test_the_origin_is_compared_with_the_host_that_the_client_asked_for(client):
    host = {"X_Forwarded_Host": "kubeai.example:8443"}
    response, _ = await post(client, f"key={ADMIN}", Origin="https://KUBEAI.example:8443", **host)
    assert response.status == 303
    response, _ = await post(client, f"key={ADMIN}", Origin="https://kubeai.example", **host)
    assert response.status == 403


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        ('{"key": "x"}', "application/json", 415),
        ("key=a&key=b", login.FORM_TYPE, 400),
        ("key=a&other=b", login.FORM_TYPE, 400),
        ("other=a", login.FORM_TYPE, 400),
        ("", login.FORM_TYPE, 400),
        ("key", login.FORM_TYPE, 400),
        ("key=%FF", login.FORM_TYPE, 400),
        ("key=\xff", login.FORM_TYPE, 400),
        ("key=" + "k" * 4096, login.FORM_TYPE, 413),
    ],
)
async def test_a_body_that_is_not_the_form_is_refused(client, gateway, body, kind, status):
    response, _ = await post(client, body, kind=kind)
    assert response.status == status
    assert gateway.checked == []


def test_only_the_two_posts_need_no_key():
    assert login.is_login("POST", "/ui/login")
    assert login.is_login("POST", "/ui/logout")
    for method, path in (
        ("GET", "/ui/login"), ("POST", "/ui/login/"), ("POST", "/ui/Login"), ("POST", "/ui"),
        ("POST", "/ui/login%2f"), ("PUT", "/ui/logout"), ("POST", "//ui/login"),
    ):  # fmt: skip
        assert not login.is_login(method, path)


def test_the_policy_allows_the_forms_own_style_and_no_script():
    page = login.login_page("no")
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = login.HEADERS["Content-Security-Policy"]
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "<script" not in page
    assert " on" not in re.sub(r"<style>.*?</style>", "", page).split("<body>")[0]
