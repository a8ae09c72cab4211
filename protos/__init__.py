"""The contract between coordinator and shard workers.

Membership test: must two processes agree on it bit for bit? Then it lives here (messages, tensor and digest codecs, error
table, channel settings, log keys), and nothing else does.
"""

import os

# gRPC's C core writes a line to standard error for every connection that ends, unless told otherwise before it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
