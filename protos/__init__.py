"""The contract between coordinator and shard workers.

Membership test: must two processes agree on it bit for bit? Then it lives here (messages, tensor and digest codecs, error
table, checkpoint headers, channel settings, exit codes), and nothing else does.
"""

import os

# Two libraries read their environment once, when they are imported, and have defaults that suit no mesh: gRPC's C core writes
# lines of its own to standard error and hands each message through a pool of threads before its completion queue sees it,
# and OpenMP's idle threads spin on a core that somebody else needs.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault(
    "GRPC_EXPERIMENTS",
    "-event_engine_client,-event_engine_listener,-event_engine_for_all_other_endpoints,-event_engine_callback_cq",
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
