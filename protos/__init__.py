"""The contract between coordinator and shard workers.

Membership test: must two processes agree on it bit for bit? Then it lives here (messages, tensor and digest codecs, error
table, channel settings, log keys), and nothing else does.
"""
