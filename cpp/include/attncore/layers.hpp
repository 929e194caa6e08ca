// attncore's layers: what stands around attention in a model and shares its matrix products.
#pragma once

#include <attncore/attncore.hpp>

namespace attncore {

/// Rotary position embedding (Su et al. 2021): pairs of dims are rotated by position · frequency.
struct Rope {
  Tensor positions{};   ///< ints, (1 or batch, 1, token, 1); not given: 0, 1, …
  double base = 10000;  ///< frequency i is base^(−2i / dims), unless `frequencies` says what it is
  Index dims = 0;  ///< the first so many dims are rotated, an even number; 0: two for each frequency, or all
  bool interleaved = false;           ///< pairs are dims (2i, 2i + 1); else (i, i + dims / 2)
  std::vector<double> frequencies{};  ///< dims / 2: those of models whose context was stretched
  double factor = 1;                  ///< what is rotated is multiplied by it too (YaRN's, Peng et al. 2023)
};

/// out = x rotated; x and out are (batch, head, token, dim) of one dtype, out may be x.  `inverse` rotates the
/// other way, which is the gradient.  This and the functions below throw as forward().
void rope(const Tensor& x, const Rope& rope, const Tensor& out, bool inverse = false,
          const Options& options = {});

/// out = x·weightᵀ + bias, then `rotary` if given.  Features are (head, dim) pairs, so that projections split and join
/// heads by strides alone: x is (batch, in_heads, token, in_dim), weight (1, 1, out_features, in_features) with
/// in_features = in_heads · in_dim, bias (1, 1, 1, out_features) or not given, out (batch, out_heads, token,
/// out_dim), written.  All share one dtype; sums are in float32 (float64).  The bits of a row depend on that row of x,
/// weight and bias alone.
void linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out,
            const Rope* rotary = nullptr, const Options& options = {});

/// What linear_backward writes, given the gradient d_y with respect to linear's out; a result without `data` is not wanted.
struct LinearGradients {
  Tensor d_x{}, d_weight{}, d_bias{};  ///< like x, weight and bias
};
void linear_backward(const Tensor& d_y, const Tensor& x, const Tensor& weight,
                     const LinearGradients& gradients, const Rope* rotary = nullptr,
                     const Options& options = {});

/// What a multi-head attention layer is made of (Vaswani et al. 2017).  A 0 means the default.
struct MultiHeadAttentionSettings {
  Index embed_dim = 0;               ///< width of x and of y
  Index num_heads = 0;               ///< query heads
  Index num_kv_heads = 0;            ///< default num_heads; heads is a multiple of it
  Index key_dim = 0, value_dim = 0;  ///< widths of what keys and values are made from; default embed_dim
  Index head_dim = 0;                ///< default embed_dim / num_heads
  bool bias = true;                  ///< all four projections have one
  bool bias_kv = false;              ///< a learned key and value that every query sees (torch's add_bias_kv)
  bool add_zero_attn = false;        ///< a key and value of zeros that every query sees
  std::optional<Rope> rotary{};      ///< queries and keys are rotated; its positions come with each call
  std::optional<double>
      qk_norm{};             ///< ε: queries and keys are x / √(mean x² + ε) · gain, before they are rotated
  DType dtype = DType::f32;  ///< of parameters, inputs and outputs
  std::uint64_t seed = 0;    ///< of the initial values, which are as torch's
};

struct MultiHeadState;

/// y = concat_h(attention(x·W_qᵀ, context·W_kᵀ, value_context·W_vᵀ)_h)·W_oᵀ, with torch.nn.MultiheadAttention's
/// parameters.  All results are exact attention's; memory is O(tokens).  docs/layers.md says what each option means.
class MultiHeadAttention {
 public:
  /// Throws DTypeError and std::invalid_argument.
  explicit MultiHeadAttention(const MultiHeadAttentionSettings& settings);

  /// The settings, every default in place.
  [[nodiscard]] const MultiHeadAttentionSettings& settings() const noexcept { return settings_; }

  /// Named and shaped as torch.nn.MultiheadAttention's: in_proj_weight, or q_proj_weight, k_proj_weight and
  /// v_proj_weight where widths or numbers of heads differ; in_proj_bias; bias_k, bias_v; q_norm.weight, k_norm.weight
  /// (head_dim); out_proj.weight, out_proj.bias.  The layer owns both tensors; values may be written between calls.
  struct Parameter {
    std::string name;
    std::vector<Index> shape;
    Tensor value{}, gradient{};  ///< without gaps; the shape's axes are the last ones
  };
  [[nodiscard]] const std::vector<Parameter>& parameters() const noexcept { return parameters_; }

  struct Inputs {
    Tensor x{};              ///< (batch, 1, query, embed_dim)
    Tensor context{};        ///< optional: (batch, 1, key, key_dim); not given: x
    Tensor value_context{};  ///< optional: (batch, 1, key, value_dim); not given: context
    Tensor positions{};      ///< for `rotary`: ints (1 or batch, 1, query, 1); not given: 0, 1, …
    Tensor key_positions{};  ///< the context's; not given: x's for self-attention, else 0, 1, …
    /// As forward()'s, over (batch, head, query, key).  The default query_offset of self-attention is 0.  What bias_kv
    /// and add_zero_attn append stands apart from the keys: it has no mask, bias, length nor position.
    Score score{};
    Dropout dropout{};
    Precision precision = Precision::highest;
  };

  /// Of heads, (batch, head, token, head_dim), the last axis without gaps; written.  One without `data` is not wanted.
  struct HeadTensors {
    Tensor query{}, key{}, value{};
  };

  /// The first half of forward: queries of x, keys and values of the contexts (of x, where there are none), normed but not
  /// rotated: caches rotate by the positions that they know.  Of `inputs` x and the contexts are read, as far as something is
  /// made from them; bias_kv and add_zero_attn append nothing here.  Throws as attncore::forward.
  void in_proj(const Inputs& inputs, const HeadTensors& heads, const Options& options = {}) const;

  /// The last step of forward, y = out·W_oᵀ + b_o: out (batch, num_heads, query, head_dim) is what attention gave, y (batch, 1,
  /// query, embed_dim), written.  Throws as attncore::forward.
  void out_proj(const Tensor& out, const Tensor& y, const Options& options = {}) const;

  /// What forward leaves for backward and weights: queries, keys, values and outputs of the heads, in memory that the
  /// next forward reuses, and views of the inputs, which must stay as they are until then.
  class Activations {
   public:
    Activations();
    ~Activations();
    Activations(Activations&&) noexcept;
    Activations& operator=(Activations&&) noexcept;
    [[nodiscard]] std::size_t bytes() const noexcept;

   private:
    friend class MultiHeadAttention;
    std::unique_ptr<MultiHeadState> state_;
  };

  /// y (batch, 1, query, embed_dim), written.  May run in several threads at once, each with its own activations.
  /// Throws as attncore::forward; the activations of a call that throws are of no use.
  void forward(const Inputs& inputs, const Tensor& y, Activations* activations = nullptr,
               const Options& options = {}) const;

  /// What backward reads and writes beside parameters; a result without `data` is not wanted.
  struct InputGradients {
    Tensor d_y{};                                  ///< like y
    Tensor d_x{}, d_context{}, d_value_context{};  ///< like the inputs; written
    BoundedArray<Tensor, kMaxBiases> d_biases{};
    Tensor d_alibi{}, d_relative_bias{}, d_sinks{};  ///< as attncore::Gradients has them
  };

  /// Writes the gradients of all parameters, or adds to them (`accumulate`), and those of inputs.  One thread at a time.
  void backward(const Activations& activations, const InputGradients& gradients, bool accumulate = false,
                const Options& options = {});

  /// The probabilities of the call, before dropout: (batch, heads, query, keys + appended), or (batch, 1, …) for their
  /// mean over the heads; f32, f64 for f64; written.  What is appended comes last, bias_k before the zeros.
  void weights(const Activations& activations, const Tensor& probabilities,
               const Options& options = {}) const;

 private:
  MultiHeadAttentionSettings settings_;
  std::uint64_t identity_;  // which activations know
  Workspace values_, gradients_;
  std::vector<Parameter> parameters_;
};

}  // namespace attncore
