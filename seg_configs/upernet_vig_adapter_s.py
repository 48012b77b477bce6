# UperNet on ViG-S with a ViT-Adapter: strides 4, 8, 16 and 32, each with the feature after one interaction.
_base_ = "./_base_/upernet_ade20k_160k.py"
model = dict(
    backbone=dict(_delete_=True, type="ViGAdapter", arch="small", add_features="each", drop_path_rate=0.2),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.85))
