"""What a device computes, behind one Protocol (`interface`): they know no session and no wire.

`plain` is torch's operators (attention, experts, linear, norm, rope, quantize), `compiled` calls `shardworker.native`, `cuda` has
Triton kernels; `choose` takes the fastest that can be had.
"""
