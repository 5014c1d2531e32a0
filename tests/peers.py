"""The networks of other projects that baselines.py compares the scripts with."""
import torch
import torch.nn as nn


class PlainTransformer(nn.Module):
    """PyTorch's own Transformer with the same sizes, embeddings and positions."""

    def __init__(self, module, vocabulary, d_model, heads, layers, d_ff, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.net = nn.Transformer(d_model, heads, layers, layers, d_ff, dropout, batch_first=True, norm_first=True)
        self.out = nn.Linear(d_model, vocabulary)
        self.register_buffer("positions", module.sinusoids(1024, d_model))
        self.dropout, self.scale = nn.Dropout(dropout), d_model**0.5

    def forward(self, src, tgt):
        def embed(x):
            return self.dropout(self.embedding(x) * self.scale + self.positions[: x.shape[1]])
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], src.device)
        return self.out(self.net(embed(src), embed(tgt), tgt_mask=causal, src_key_padding_mask=src == 0,
                                 tgt_key_padding_mask=tgt == 0, memory_key_padding_mask=src == 0, tgt_is_causal=True))


class NotebookLAS(nn.Module):
    """The course notebook's model: packed BLSTMs, three pyramid layers, and a speller of 1024 and 128 units."""

    def __init__(self, n_features, vocabulary, hidden=512):
        super().__init__()
        self.base = nn.LSTM(n_features, hidden, bidirectional=True, batch_first=True)
        self.pyramid = nn.ModuleList(nn.LSTM(4 * hidden, hidden, bidirectional=True, batch_first=True) for _ in range(3))
        self.key, self.value = nn.Linear(2 * hidden, 128), nn.Linear(2 * hidden, 128)
        self.embedding = nn.Embedding(vocabulary, 256)
        self.cells = nn.ModuleList([nn.LSTMCell(256 + 128, 1024), nn.LSTMCell(1024, 128)])
        self.out = nn.Linear(256, vocabulary)

    def forward(self, x, lengths, targets):
        pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
        x, lengths = pad(self.base(pack(x, lengths, batch_first=True, enforce_sorted=False))[0], batch_first=True)
        for layer in self.pyramid:
            x, lengths = x[:, : x.shape[1] // 2 * 2].reshape(len(x), -1, 2 * x.shape[2]), lengths // 2
            x, lengths = pad(layer(pack(x, lengths, batch_first=True, enforce_sorted=False))[0], batch_first=True)
        key, value = self.key(x), self.value(x)
        mask = torch.arange(x.shape[1])[None] >= lengths[:, None]
        context, states, logits, plot = value[:, 0], [None, None], [], []
        for u in range(targets.shape[1]):
            token = torch.full_like(targets[:, 0], 1) if u == 0 else targets[:, u - 1]
            states[0] = self.cells[0](torch.cat([self.embedding(token), context], 1), states[0])
            states[1] = self.cells[1](states[0][0], states[1])
            energy = torch.bmm(key, states[1][0].unsqueeze(2)).squeeze(2).masked_fill(mask.to(key.device), -1e9)
            attention = energy.softmax(1)
            plot.append(attention[0].detach().cpu().numpy())
            context = torch.bmm(attention.unsqueeze(1), value).squeeze(1)
            logits.append(self.out(torch.cat([states[1][0], context], 1)))
        return torch.stack(logits, 1)


class Embedded(nn.Module):
    """A ConvNeXt of timm's or torchvision's, in a memory format, behind the interface of convnext_face.py's."""

    def __init__(self, kind, layout, classes, cfg):
        super().__init__()
        if kind == "timm":
            import timm
            self.net = timm.create_model("convnext_tiny", num_classes=classes, drop_path_rate=cfg.drop_path)
            self.parts = lambda x: self.net.forward_head(self.net.forward_features(x), pre_logits=True)
            self.out = lambda f: self.net.head.fc(f)
        else:
            import torchvision
            self.net = torchvision.models.convnext_tiny(num_classes=classes, stochastic_depth_prob=cfg.drop_path)
            self.parts = lambda x: self.net.classifier[:2](self.net.avgpool(self.net.features(x)))
            self.out = lambda f: self.net.classifier[2](f)
        self.layout = getattr(torch, layout)
        self.to(memory_format=self.layout)
        self.norm = nn.LayerNorm(768, elementwise_affine=True).requires_grad_(False)  # its width is looked at

    def forward(self, x, with_features=False):
        f = self.parts(x.contiguous(memory_format=self.layout))
        return self.out(f).float(), f.float()
