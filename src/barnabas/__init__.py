"""Barnabas carries events (topics and consumers) and jobs (queues and workers) in one model."""

from barnabas.app import App
from barnabas.consumer import Batch
from barnabas.engine.respond import Respond, respond_to
from barnabas.errors import Reject, RetryAfter
from barnabas.jobs.beyond import progress, steps
from barnabas.jobs.limit import Concurrent, Rate
from barnabas.jobs.unique import until_and_while_executing, until_executed, until_executing, until_expired, while_executing
from barnabas.message import Delivery, Message
from barnabas.retry import Retry
from barnabas.topic import Retention
from barnabas.verdict import Again, Dead, Done, Release

__version__ = "0.1.0"
__all__ = [
    "Again", "App", "Batch", "Concurrent", "Dead", "Delivery", "Done", "Message", "Rate", "Reject", "Release", "Respond",
    "Retention", "Retry", "RetryAfter", "progress", "respond_to", "steps", "until_and_while_executing", "until_executed",
    "until_executing", "until_expired", "while_executing",
]
