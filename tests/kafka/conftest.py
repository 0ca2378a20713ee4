"""Apps on a real broker, each test with a prefix of its own."""

import secrets
from collections.abc import Iterator

import pytest
from servers import shared_kafka

from barnabas import App


@pytest.fixture
def make() -> Iterator[object]:
    prefix, apps = secrets.token_hex(4), []

    def app(create_topics: bool = True, servers: str = "", **settings: object) -> App:
        url = f"kafka://{servers or shared_kafka()}?prefix={prefix}-"
        apps.append(App("shop", events=url, jobs="memory:", create_topics=create_topics, **settings))
        return apps[-1]

    yield app
    for each in apps:
        each.close()
