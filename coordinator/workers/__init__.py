"""The other side: clients of the shard workers, and the pool that makes a mesh of them."""
