"""The privacy books: mechanisms and their costs, the Rényi filter, the append-only ledger, leases, and the actor.

Plain Python over SQLAlchemy; only `actor` may import Ray. Nothing here sees a record, a gradient or a metric.
"""
