"""How a network is sharded: `ParallelConfig`, named axes, layouts, shard slices, topology."""
