"""The coordinator decides; this is the way of a token through its files.

cli, commands/      flags and what a person sees
access, api_keys    who gets in: certificates shown and trusted, callers' keys (certificates: a set for one machine)
client, channel     a caller; a connection that follows its certificates
embedded, private_mesh
                    a mesh for the lifetime of one command
app, supervisor     builds, starts, drains, stops; keeps a full mesh, and recovers it (proof, canary, recovery)
mesh, resharding    a mesh and how one is built; the next one, of another number of shards, beside the one that serves
discovery/, attempts
                    which workers there are, who may hand out plans; trying until there is a mesh
service, intake     the Generation service: message <-> request
status              what the mesh says of itself
text/               tokenizer, chat template, incremental detokenizing, stop texts
request, sequence   what is asked for; the journal of one request
scheduler, pages    which rows go into the next step; KV page accounting (pure)
engine              the loop: schedule, forward, sample, emit (completion: to whoever asked)
forward             the layer loop, readable as the formula of the model (microbatches: when a step goes in two halves)
resident, router    the small whole weights; the gate
fanout, reduce      one round to all shards; the sum of their partials in shard order
head, scores        the output head: candidates of all shards, merged
sampler             scores -> token (pure)
workers/            clients of the workers, assignment, loading, and sending them weights
rounds, bench/      what each round cost; benchmarks and timelines made of that
observer, metrics   what the engine tells, and what is remembered of it (tally: of rounds; heat: of experts)
telemetry           which of both is asked for: metrics, traces
exposition          all that Prometheus is told
spans, tracing      OpenTelemetry: request > step > round, and where they are sent (trace_context: the caller's trace;
                    span_attributes: what spans say)
models/, planning/  config.json and headers -> spec -> slices -> shard plans (pure)
"""
