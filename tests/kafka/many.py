"""The app of the test of many: one group of 100 topics, or 100 groups of one."""

import os

from barnabas import App

app = App("many", events=os.environ["MANY_URL"], jobs="memory:", create_topics=True)
topics = [app.topic(f"t{n}", int, partitions=1) for n in range(100)]
for n, some in enumerate([topics] if os.environ["MANY_GROUPS"] == "1" else [[topic] for topic in topics]):
    app.consumer(some, name=f"g{n}")(lambda n: None)
