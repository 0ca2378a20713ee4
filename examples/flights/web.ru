# Sidekiq's own web page, for `puma`: it shows the jobs and processes of both languages.
require "sidekiq"
require "sidekiq/web"
Sidekiq.configure_client { |config| config.redis = { url: ENV.fetch("REDIS_URL") } }
use Rack::Session::Cookie, secret: "x" * 64, same_site: true
run Sidekiq::Web
