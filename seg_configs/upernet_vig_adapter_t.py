# UperNet on ViG-T with a ViT-Adapter: strides 4, 8, 16 and 32, each with the feature after one interaction.
_base_ = "./_base_/upernet_ade20k_160k.py"
model = dict(
    backbone=dict(_delete_=True, type="ViGAdapter", arch="tiny", add_features="each", drop_path_rate=0.1),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    optimizer=dict(lr=12e-5),  # twice that of the larger models
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
