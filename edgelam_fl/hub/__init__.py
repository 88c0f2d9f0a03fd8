"""The hub: the server's own end of the data plane, one address and one port, beside Flower's SuperLink."""

PORT, STATE = "EDGELAM_HUB_PORT", "EDGELAM_HUB_STATE"  # environment of a ServerApp: port and state folder of the hub
OFFERS = "models"  # in the state folder: what runs offer
