"""Ending what was started in Ray, by its name and not by the process."""

from __future__ import annotations

import time

import ray

from cluster.environment import ACCOUNTANT, NAMESPACE


def end_accountant() -> None:
    """End the accountant of this process's Ray, if there is one, and wait until its name is free."""

    def there() -> bool:
        return any(actor["name"] == ACCOUNTANT for actor in ray.util.list_named_actors(all_namespaces=True))

    if there():
        ray.kill(ray.get_actor(ACCOUNTANT, namespace=NAMESPACE))
    while there():
        time.sleep(0.05)
