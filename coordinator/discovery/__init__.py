"""Which workers there are, where no list names them, and which of several coordinators may hand out plans to them.

target          what --discover and --lease say
interfaces      a source of addresses, a lease: what the rest of the coordinator knows of either
dns             addresses of a name, asked for again and again
api, watch      the Kubernetes API over asyncio; a list of its objects, kept up to date
endpoint_slices addresses of a Service
lease           a Lease: one coordinator at a time holds it
neighbours      all of that, opened and run
"""
