"""Native code: what this machine can build, and kernels, each beside its plain torch equivalent."""
