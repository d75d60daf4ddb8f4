"""Where the bytes of each sample lie, in local and remote shards."""
