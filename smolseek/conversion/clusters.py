"""K-means by cosine, of which carving and upcycling each make a kind of their own.

Shapes: N points, Z coordinates of a point, P clusters.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cluster_centres(points_NZ: Tensor, cluster_N: Tensor, clusters: int) -> Tensor:
    """Returns the centre (P, Z) of each cluster, at norm 1; zero for a cluster without points."""
    member_NP = F.one_hot(cluster_N, clusters).to(points_NZ)
    return F.normalize(member_NP.T @ points_NZ, dim=1)
