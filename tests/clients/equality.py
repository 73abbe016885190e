"""Adapters trained through the server in three ways: each alone, two interleaved, and all whose requests wait together."""

import plan


def train_alone(driver, adapter):
    trained = Trained(driver, adapter, "alone")
    for step in range(plan.STEPS):
        trained.submit_pass(step)
        trained.receive_pass()
        trained.submit_step()
        trained.receive_step()
    return trained.finish()


def train_interleaved(driver, adapters):
    all_trained = [Trained(driver, adapter, "interleaved") for adapter in adapters]
    for step in range(plan.STEPS):
        for trained in all_trained:
            trained.submit_pass(step)
            trained.receive_pass()
        for trained in all_trained:
            trained.submit_step()
            trained.receive_step()
    return [trained.finish() for trained in all_trained]


def train_together(driver, adapters):
    all_trained = [Trained(driver, adapter, "together") for adapter in adapters]
    for step in range(plan.STEPS):
        # Nothing is waited for before all is submitted.
        for trained in all_trained:
            trained.submit_pass(step)
        for trained in all_trained:
            trained.submit_step()
        for trained in all_trained:
            trained.receive_pass()
            trained.receive_step()
    return [trained.finish() for trained in all_trained]


class Trained:
    """An adapter in training, with what the server said."""

    def __init__(self, driver, adapter, way):
        self.driver, self.adapter, self.way = driver, adapter, way
        self.client = driver.create(f"{way}-{adapter}", adapter)
        self.start = driver.save(self.client, "start")
        self.losses = []

    def submit_pass(self, step):
        self.passed = self.driver.forward_backward(self.client, plan.data(self.adapter, step))

    def receive_pass(self):
        self.losses.append(self.driver.loss(self.passed))

    def submit_step(self):
        self.stepped = self.driver.optim_step(self.client, plan.settings(self.adapter))

    def receive_step(self):
        self.stepped.result(timeout=60)

    def finish(self):
        end = self.driver.save(self.client, "end")
        told = {"adapter": self.adapter, "way": self.way, "divide": self.driver.divides, "losses": self.losses}
        return {**told, "start": str(self.start), "end": str(end)}


def run(driver, count, ways=("alone", "interleaved", "together")):
    """Trains the first `count` adapters in each of `ways`; `together` takes more than two."""
    ask = {
        "alone": lambda: [train_alone(driver, adapter) for adapter in range(count)],
        "interleaved": lambda: train_interleaved(driver, [0, 1]),
        "together": lambda: train_together(driver, range(count)) if count > 2 else [],
    }
    return [told for way in ways for told in ask[way]()]
