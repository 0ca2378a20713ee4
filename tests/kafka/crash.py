"""The app of the crash test: CRASH makes its first settlement a SIGKILL, when the outputs are stored and nothing else is."""

import os
import signal

from barnabas import App
from barnabas.backends.kafka_group import KafkaMember
from barnabas.errors import Reject

options = {"session_timeout": 3.0, "checkpoint_interval": 5.0, "create_topics": True}
app = App("shop", events=os.environ["CRASH_URL"], jobs="memory:", **options)
source, answers, out = app.topic("source", int, partitions=1), app.topic("answers", int), app.topic("out", int)

if os.environ.get("CRASH"):
    KafkaMember.settle = lambda self, results: os.kill(os.getpid(), signal.SIGKILL)


@app.consumer(source, name="step", responds=[answers])
def step(n: int) -> int:
    if n == 3:
        raise Reject("three")
    out.send(n)
    out.send_many([n, n])
    return 10 * n
