# UperNet on ViG-B with a ViT-Adapter: strides 4, 8, 16, 32, each with the feature after one interaction, at 640 x 640.
_base_ = "./_base_/upernet_ade20k_160k_640.py"
model = dict(
    backbone=dict(_delete_=True, type="ViGAdapter", arch="base", add_features="each", drop_path_rate=0.3),
    decode_head=dict(in_channels=[768] * 4),
    auxiliary_head=dict(in_channels=768),
    test_cfg=dict(mode="slide", crop_size=(640, 640), stride=(426, 426)),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
