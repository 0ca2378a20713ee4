"""A broker that speaks TLS alone, knows its users by password (SASL) and what each may do (ACLs); secrets stay secret."""

import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AclBinding, AclOperation, AclPermissionType, AdminClient, ResourcePatternType, ResourceType
from servers import need

from barnabas import App
from barnabas.errors import NotAuthenticated, NotAuthorised
from barnabas.worker import Worker

DEV = [sys.executable, str(Path(__file__).parents[2] / "dev" / "kafka")]
PASSWORDS = {"admin": "pw-" + secrets.token_hex(8), "clerk": "pw-" + secrets.token_hex(8)}
JAAS = "org.apache.kafka.common.security.plain.PlainLoginModule required"


def options(user: str, folder: Path, password: str = "") -> dict[str, str]:
    (folder / user).write_text(password or PASSWORDS[user])
    return {
        "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": user, "ssl.ca.location": f"{folder}/ca.pem",
        "sasl.password": f"file:{folder}/{user}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address, and a folder with the authority's certificate. The clerk may read and write what begins with "clerk-"."""
    need("java", "mvn", "openssl")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(words: str) -> None:
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)

    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=authority -days 2")
    openssl("req -x509 -newkey rsa:2048 -nodes -keyout other.key -out other.pem -subj /CN=other -days 2")
    openssl("req -newkey rsa:2048 -nodes -keyout key.pem -out request.pem -subj /CN=broker")
    openssl("x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -extfile names -out cert.pem -days 2")
    (folder / "store.pem").write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    users = "".join(f' user_{name}="{password}"' for name, password in PASSWORDS.items())
    settings = {
        "listener.security.protocol.map": "PLAINTEXT:SASL_SSL,CONTROLLER:PLAINTEXT",
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.plaintext.plain.sasl.jaas.config": f'{JAAS} username="admin" password="{PASSWORDS["admin"]}"{users};',
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": folder / "store.pem",
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": folder / "ca.pem",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:admin;User:ANONYMOUS",
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    where = ["--dir", str(folder / "kafka"), "--heap", "256m"]
    started = subprocess.run([*DEV, "start", *where, *words], check=True, stdout=subprocess.PIPE, text=True)
    servers = started.stdout.strip()
    try:
        admin = AdminClient({**options("admin", folder), "sasl.password": PASSWORDS["admin"], "bootstrap.servers": servers})
        kinds = [(ResourceType.TOPIC, "clerk-"), (ResourceType.GROUP, "clerk-")]
        rights = [
            AclBinding(kind, name, ResourcePatternType.PREFIXED, "User:clerk", "*", AclOperation.ALL, AclPermissionType.ALLOW)
            for kind, name in kinds
        ]
        for future in admin.create_acls(rights).values():
            future.result(30)
        yield servers, folder
    finally:
        subprocess.run([*DEV, "stop", *where], check=True)


def ignore(value: int) -> None: ...


def shop(broker: tuple[str, Path], user: str, **more: str) -> App:
    servers, folder = broker
    settings = {"kafka": options(user, folder) | more, "session_timeout": 3.0, "create_topics": True}
    return App("shop", events=f"kafka://{servers}?prefix=clerk-", jobs="memory:", **settings)


@pytest.mark.slow
def test_messages_pass_by_tls_for_a_user_with_a_password_from_a_file(broker, monkeypatch) -> None:
    app, seen = shop(broker, "clerk"), []
    topic = app.topic("orders", int)
    app.consumer(topic, name="read")(seen.append)
    worker = Worker(app)
    worker.start()
    topic.send_many(range(100)).result(30)
    deadline = time.monotonic() + 60
    while len(seen) < 100 or not worker.drained():
        assert time.monotonic() < deadline and worker.failed() is None
        time.sleep(0.05)
    assert not worker.stop(10.0) and sorted(seen) == list(range(100))
    app.close()
    monkeypatch.setenv("CLERKS_PASSWORD", PASSWORDS["clerk"])
    other = shop(broker, "clerk", **{"sasl.password": "env:CLERKS_PASSWORD"})
    assert other.topic("orders", int).send(7).result(30).value == 7
    other.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"sasl.password": "pw-wrong"}, "uthentication failed"), ({"ssl.ca.location": "other.pem"}, "certificate verify failed")],
)
def test_who_is_not_let_in_is_told_at_once(broker, wrong, why, caplog) -> None:
    """A worker, a sender, an operator."""
    caplog.set_level(logging.DEBUG)
    if "ssl.ca.location" in wrong:
        wrong = {"ssl.ca.location": str(broker[1] / "other.pem")}
    app = shop(broker, "clerk", **wrong)
    topic = app.topic("orders", int)
    app.consumer(topic, name="read")(ignore)
    began = time.monotonic()
    for act in (lambda: topic.send(1).result(60), Worker(app).start, lambda: app.events.positions()):
        with pytest.raises(NotAuthenticated, match=rf"refused the connection \(.*{why}.*\); see to sasl\.username") as caught:
            act()
        assert "pw-" not in f"{caught.value} {caught.value.__cause__}"
    assert time.monotonic() - began < 10
    app.close()
    assert "pw-" not in caplog.text


@pytest.mark.slow
def test_what_a_user_may_not_do_is_an_error_of_its_own(broker) -> None:
    servers, folder = broker
    for user, create in (("admin", True), ("clerk", False)):
        url = f"kafka://{servers}?prefix=secret-"
        app = App("shop", events=url, jobs="memory:", kafka=options(user, folder), create_topics=create)
        topic = app.topic("orders", int)
        app.consumer(topic, name="read")(ignore)
        began = time.monotonic()
        if user == "admin":
            topic.send(1).result(30)
        else:
            for act in (lambda: topic.send(1).result(30), Worker(app).start):  # noqa: B023
                with pytest.raises(NotAuthorised, match=r"does not allow it .*; give its user the right"):
                    act()
            assert time.monotonic() - began < 10
        app.close()


@pytest.mark.slow
def test_dead_letters_are_dealt_with_by_whom_a_transaction_is_allowed(broker) -> None:
    app = shop(broker, "clerk")
    app.topic("orders", int).send(1).result(30)
    with pytest.raises(NotAuthorised, match=r"as 'shop-dead': .* does not allow it .*ransactional"):
        app.events.finish("shop-dead", [("orders", 0, 0, None)])
    app.close()


@pytest.mark.slow
def test_secrets_are_in_nothing_that_is_printed(broker, tmp_path: Path) -> None:
    servers, folder = broker
    (tmp_path / "shop.py").write_text('from barnabas import App\napp = App("shop")\n\n@app.consumer(app.topic("orders", int))\n'
                                      "def read(n: int) -> None: ...\n")  # fmt: skip
    for given in (f"file:{folder}/clerk", "env:CLERK", PASSWORDS["clerk"], "pw-wrong"):
        table = options("clerk", folder) | {"sasl.password": given}
        toml = ['log_level = "debug"', "[jobs]", 'url = "memory:"', "[events]", f'url = "kafka://{servers}?prefix=clerk-"']
        toml += ["[kafka]"] + [f'"{name}" = "{value}"' for name, value in table.items()]
        (tmp_path / "barnabas.toml").write_text("\n".join(toml))
        env = os.environ | {"CLERK": PASSWORDS["clerk"]}
        for command in (["check"], ["topics", "plan"], ["lag"], ["run", "--drain", "--create-topics"]):
            words = [sys.executable, "-m", "barnabas", *command, *([] if command[0] == "run" else ["--app"]), "shop:app"]
            done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
            said = done.stdout + done.stderr
            assert "pw-" not in said and said, (command, said)
            wrong = given == "pw-wrong"
            assert ("refused the connection" in said) == wrong and (done.returncode != 0) == wrong, (command, given, said)
