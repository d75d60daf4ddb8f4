"""Addresses of remote shards: which are read, and what a shard is called.

What of an address may be shown is in contracts/redaction.py.
"""

from __future__ import annotations

import os

from vl3train.contracts.redaction import split_address

_STORES = ("abfs", "abfss", "adl", "az", "cos", "gcs", "gs", "hf", "obs", "oci", "oss", "s3", "s3a")
_SERVERS = ("ftp", "hdfs", "http", "https", "memory", "sftp", "smb", "ssh", "webhdfs")
SCHEMES = frozenset((*_STORES, *_SERVERS))
"""Of fsspec's file systems those that lie elsewhere. Not those that read this machine's files (file, local), and not
those that open an address within an address (zip, cache, reference, whose templates are code)."""
LONGEST_NAME = 200
"""Bytes; the rows of an index lie in a file of that name and a suffix, which may have 255."""


def shard_name(address: str) -> str:
    """What a shard is called: the last part of its path.

    >>> shard_name("https://me:key@host/set/a-0.tar?Signature=abc")
    'a-0.tar'
    """
    return split_address(address)[3].rpartition("/")[2]


def address_problem(address: str) -> str | None:
    """Why no shard is read from an address, in words that hold no secret; None where it is."""
    scheme = split_address(address)[0]
    if not scheme:
        return "it is no address; write one as s3://bucket/a.tar, or put local shards into the folder itself"
    if scheme not in SCHEMES or "::" in address:
        return (
            f"addresses of this kind ({scheme}) are not read; there are {', '.join(sorted(SCHEMES))}. Local shards "
            "belong into the folder itself, as files or links"
        )
    name = shard_name(address)
    if name in ("", ".", "..") or "\\" in name or not name.isprintable():
        return "its path does not end in the name of a file"
    if len(os.fsencode(name)) > LONGEST_NAME:
        return f"its file's name has {len(os.fsencode(name))} bytes, more than {LONGEST_NAME}"
    return None
