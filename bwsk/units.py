"""Units of sizes. All sizes are counted in bytes and shown in MiB; no file of the project uses megabytes of 10^6."""

MIB = 2**20  # bytes
