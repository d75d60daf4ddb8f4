"""One layer over packs, with its gradients written out."""
