"""Several machines on one Linux box: namespaces with sshd, slurmd and fake GPUs, to try launches without a cluster."""
