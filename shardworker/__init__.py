"""A shard worker: starts empty, becomes a shard by a plan, serves its slice of each round, keeps nothing irreplaceable.

In the order of the data:

    cli, app          flags, server, signals
    peers             whom a worker obeys
    service           the ShardWorker service: messages in, messages out (lease: until nobody drives a session any more)
    holding           which plans and epochs the worker holds, and who may replace them (loading: one on its way)
    plan              whether a plan agrees with itself
    weights, loader   what a plan asks to be kept in memory, and reading it from a source (a folder, or the coordinator: supply)
    executor          the owner of the device: one job at a time, in its thread or on the event loop; loads beside
    session           the rounds of one coordinator (operands: what each brings; tables: positions and pages)
    shard, kv         the arithmetic of a round; keys and values
    kernels           what a device computes, behind one interface: torch's operators, compiled code, Triton
    native            the compiled code
    exposition        all that Prometheus is told (tally: what rounds cost)
    bandwidth         the memory's rate, beside which their speed is judged

Membership test: does it touch a slice? What is decided, or whole, belongs to the coordinator.
"""
