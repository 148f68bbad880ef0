"""The services: Urza (blueprints and kernels), Tamiyo (decisions), Tolaria (training)."""
